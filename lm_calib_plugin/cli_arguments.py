"""Arguments of commands that are fields of a recipe: read, listed in the help, checked by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand

from lm_calib_plugin.errors import UserError, nearest

# Where the fields of a recipe wait in the context of a command.
_FIELDS = "lm_calib_plugin.fields"
# The model has two names everywhere: that of the harness, and that of other libraries.
MODEL = ("--pretrained", "--model")
# A comma inside a list or a quoted text is not followed by NAME=.
_SEPARATING_COMMA = re.compile(r",(?=\w+=|$)")


class WithFields(TyperCommand):
    """A command that also takes fields of a recipe, under a title of their own in its help.

    They may stand anywhere on the line, as ``--field VALUE`` or ``--field=VALUE``;
    :func:`given_fields` returns them.
    """

    title = ""

    def fields(self) -> list[str]:
        """Return the names of the fields."""
        raise NotImplementedError

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the fields of a recipe out; everything else is read as usual."""
        flags = {flag_of(name): name for name in self.fields()}
        own = [flag for p in self.get_params(ctx) for flag in (*p.opts, *p.secondary_opts)]
        found: dict[str, str] = {}
        rest: list[str] = []
        left = list(args)
        while left:
            word = left.pop(0)
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-")
            if word == "--":
                rest += [word, *left]
                break
            if flag not in flags:
                if flag.startswith("--") and flag not in own:
                    raise UserError(
                        flag,
                        "unknown option",
                        nearest(flag, [*flags, *own]),
                        f"all options: lm-calib {self.name} --help",
                    )
                rest.append(f"{flag}{equals}{value}" if flag in own else word)
                continue
            if not equals and not left:
                raise UserError(flag, "has no value", f"for instance {flag} VALUE")
            found[flags[flag]] = value if equals else left.pop(0)
        ctx.meta[_FIELDS] = found
        return list(super().parse_args(ctx, rest))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """List the fields with their meanings, below the options of the command."""
        from lm_calib_plugin.listing import documented
        from lm_calib_plugin.recipe import Recipe

        super().format_options(ctx, formatter)
        meanings = documented(Recipe)
        with formatter.section(self.title):
            formatter.write_dl(
                [(f"{flag_of(f)} VALUE", meanings.get(f, "")) for f in self.fields()]
            )


class WithSet(WithFields):
    """A command that also takes every field of a recipe that decides the calibration set."""

    title = "Options of the calibration set"

    def fields(self) -> list[str]:
        """Return the fields that ``calibrate`` takes beside its expression."""
        from lm_calib_plugin.recipe import Recipe

        return [name for name in Recipe.calibration_fields() if name != "calibration"]


class WithMethod(WithFields):
    """A command that also takes every option of a method."""

    title = "Options of the method"

    def fields(self) -> list[str]:
        """Return the fields that are options of a method."""
        from lm_calib_plugin import registry

        rows = [*registry.table("pruning").values(), *registry.table("quantization").values()]
        return list(dict.fromkeys(name for row in rows for name in row.options))


class WithRecipe(WithFields):
    """A command that also takes every field of a recipe, and ``--recipe FILE``."""

    title = "The recipe"

    def fields(self) -> list[str]:
        """Return all fields."""
        from lm_calib_plugin.recipe import Recipe
        from lm_calib_plugin.recipe_file import FILE_ARGUMENT

        return [FILE_ARGUMENT, *(n for n in Recipe.model_fields if n != "schema_version")]


def given_fields(ctx: typer.Context) -> dict[str, Any]:
    """Return the fields of a recipe that were given to a command, as texts."""
    return dict(ctx.meta[_FIELDS])


def flag_of(field: str) -> str:
    """Return the option that gives a field: ``--act-bits``."""
    return "--" + field.replace("_", "-")


def recipe_arguments(texts: Iterable[str]) -> dict[str, Any]:
    """Return the recipe part of ``KEY=VALUE,...`` texts; a bare file name is ``recipe=FILE``."""
    from lm_calib_plugin.recipe import Recipe, unknown_argument
    from lm_calib_plugin.recipe_file import FILE_ARGUMENT
    from lm_calib_plugin.runtime import RUNTIME_ARGUMENTS, Runtime

    given: dict[str, Any] = {}
    for pair in (pair for text in texts for pair in _SEPARATING_COMMA.split(text) if pair):
        name, equals, value = pair.partition("=")
        if not equals and pair.endswith((".yaml", ".yml")):
            name, value = FILE_ARGUMENT, pair
        elif not equals:
            raise UserError("recipe", f"got {pair!r}", "KEY=VALUE,... or a .yaml file")
        if given.setdefault(name, value) != value:
            raise UserError(name, f"got {given[name]!r} and {value!r}", fix="choose one")
    Runtime(**{name: given.pop(name) for name in RUNTIME_ARGUMENTS if name in given})
    # A whole --model_args line may be pasted here. What is no recipe argument nor looks like one
    # is the model loader's, whose arguments can not be known without importing it.
    known = {*Recipe.model_fields, FILE_ARGUMENT}
    foreign = [name for name in given if name not in known]
    for name in foreign:
        if "pretrained" not in given or (name != "pretrained" and nearest(name, known)):
            raise unknown_argument(name, {*known, *RUNTIME_ARGUMENTS})
    if foreign:
        typer.echo(f"left to the model loader, not checked: {', '.join(foreign)}", err=True)
    return {name: value for name, value in given.items() if name in known}


def named_texts(what: str, texts: Iterable[str]) -> dict[str, str]:
    """Return NAME=EXPR texts as a mapping."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, expression = text.partition("=")
        if not (name and equals and expression):
            raise UserError(what, f"got {text!r}", "NAME=EXPR", f"for instance --{what} web=c4")
        if name in found:
            raise UserError(what, f"`{name}` is given twice", "one name for each")
        found[name] = expression
    return found
