"""The ``lm-calib`` command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import typer
from typer.core import TyperCommand

from lm_calib_plugin.errors import CalibError, UserError, nearest

# Plain help texts: drawing boxes would triple the time that `--help` takes.
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


class _Verbatim(TyperCommand):
    """A command whose arguments belong to another program: nothing is read, dropped or moved."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return list(args)


class _Listed(str, Enum):
    methods = "methods"
    allocations = "allocations"
    scores = "scores"
    refinements = "refinements"
    updates = "updates"
    schemes = "schemes"
    transforms = "transforms"
    grids = "grids"
    roundings = "roundings"
    observers = "observers"
    sources = "sources"
    packings = "packings"
    selections = "selections"
    options = "options"


@app.callback()
def _root() -> None:
    """Prune or quantize a causal language model on load, with calibration data of your choice."""


@app.command("eval", cls=_Verbatim)
def evaluate(ctx: typer.Context) -> None:
    """Run lm_eval with our models known: the same command line, whatever starts Python."""
    from lm_calib_plugin import _autoload

    _autoload.register()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *ctx.args]
    cli_evaluate()


class _WithFields(TyperCommand):
    """A command that also takes fields of a recipe, under a title of their own in its help."""

    title = ""

    def fields(self) -> list[str]:
        raise NotImplementedError

    def format_options(self, ctx: Any, formatter: Any) -> None:
        from lm_calib_plugin.listing import documented
        from lm_calib_plugin.recipe import Recipe

        super().format_options(ctx, formatter)
        meanings = documented(Recipe)
        with formatter.section(self.title):
            formatter.write_dl([(f"{_flag(f)} VALUE", meanings.get(f, "")) for f in self.fields()])


class _WithRecipe(_WithFields):
    """A command that also takes every field of a recipe that decides the calibration set."""

    title = "Options of the calibration set"

    def fields(self) -> list[str]:
        return _set_fields()


class _WithMethod(_WithFields):
    """A command that also takes every option of a method."""

    title = "Options of the method"

    def fields(self) -> list[str]:
        return _method_fields()


_EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("calibrate", cls=_WithRecipe, context_settings=_EXTRA)
def make_set(
    ctx: typer.Context,
    expression: str = typer.Argument(metavar="EXPR", help="Sources, such as self or c4*0.5+self."),
    pretrained: str = typer.Option(..., help="Hub name, folder, or builtin:smollm2-135m."),
    out: str = typer.Option(..., help="The folder to make."),
    purpose: str = typer.Option(
        None,
        "--for",
        metavar="KEY=VALUE,...",
        help="What a mixture is to serve, such as method=wanda,sparsity=0.5.",
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the set that is there."),
    tokenizer: str = typer.Option(None, help="Another tokenizer than that of the model."),
    revision: str = typer.Option("main", help="Branch, tag or commit of the model."),
    dtype: str = typer.Option("auto", help="Of the model, where it writes text itself."),
    device: str = typer.Option(None, help="Of the model, where it writes text itself."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code"),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Build a calibration set for a model and keep it in a folder: calibration=set:DIR."""
    from pathlib import Path

    from lm_calib_plugin.expression import NO_DATA
    from lm_calib_plugin.recipe import Recipe, check_purpose
    from lm_calib_plugin.runtime import Runtime

    if expression.strip().lower() == NO_DATA:
        raise UserError("calibration", "got none", "a source", "for instance self or file:my.jsonl")
    # Any method that uses data will do, unless a mixture is found for one.
    plain = {"method": "wanda", "sparsity": 0}
    method = plain if purpose is None else _recipe_arguments([purpose])
    for name in Recipe.calibration_fields():
        if name in method:
            own = "EXPR" if name == "calibration" else _flag(name)
            raise UserError(
                "for", f"got {name}={method[name]}", "the method to serve and its options", own
            )
    recipe = Recipe(**{**method, "calibration": expression, **_extra_options(ctx, _set_fields())})
    check_purpose(recipe, purpose is not None)

    from lm_calib_plugin.calibrate import Loading, calibrate

    loading = Loading(pretrained, tokenizer, revision, dtype, device, trust_remote_code)
    runtime = Runtime(progress=not quiet)
    typer.echo(
        calibrate(recipe, loading, Path(out).expanduser(), overwrite=overwrite, runtime=runtime)
    )


@app.command("preflight")
def judge_sets(
    recipe: list[str] = typer.Argument(  # noqa: B008 - how typer declares arguments
        metavar="KEY=VALUE,...", help="Method, nsamples, seqlen..."
    ),
    pretrained: str = typer.Option(..., help="Hub name, folder, or builtin:smollm2-135m."),
    sets: list[str] = typer.Option(  # noqa: B008
        ..., "--set", metavar="NAME=EXPR", help="A calibration set."
    ),
    domains: list[str] = typer.Option(  # noqa: B008
        ..., "--domain", metavar="NAME=EXPR", help="Text of a domain to be served."
    ),
    judged: int = typer.Option(None, min=1, help="Sequences of a domain to judge on."),
    bank: str = typer.Option(None, help="Folder of the statistics bank, kept for later."),
    out: str = typer.Option(None, help="Folder for the table, a JSON file and a plot."),
    tokenizer: str = typer.Option(None, help="Another tokenizer than that of the model."),
    revision: str = typer.Option("main", help="Branch, tag or commit of the model."),
    dtype: str = typer.Option("auto", help="Of the model."),
    device: str = typer.Option(None, help="Of the model."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code"),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Judge calibration sets on domains before an evaluation is paid for: a table, one advice."""
    from pathlib import Path

    from lm_calib_plugin.recipe import Recipe
    from lm_calib_plugin.runtime import Runtime

    asked = Recipe.from_model_args(_recipe_arguments(recipe))
    named_sets, named_domains = _named("set", sets), _named("domain", domains)

    from lm_calib_plugin.calibrate import Loading
    from lm_calib_plugin.preflight import Question, preflight

    answer = preflight(
        Question(asked, named_sets, named_domains, judged),
        Loading(pretrained, tokenizer, revision, dtype, device, trust_remote_code),
        bank=Path(bank).expanduser() if bank else None,
        out=Path(out).expanduser() if out else None,
        runtime=Runtime(progress=not quiet),
    )
    typer.echo(answer.table())


@app.command("bank", cls=_WithRecipe, context_settings=_EXTRA)
def make_bank(
    ctx: typer.Context,
    pretrained: str = typer.Option(..., help="Hub name, folder, or builtin:smollm2-135m."),
    out: str = typer.Option(..., help="Folder of the bank."),
    source: list[str] = typer.Option([], metavar="NAME=EXPR", help="Give one or more."),  # noqa: B008
    folds: str = typer.Option("choose,judge", help="Folds that every source is drawn from."),
    groups: int = typer.Option(1, help="Gram matrices a part; 16 for draws of gptq, sparsegpt."),
    second_order: bool = typer.Option(True, help="Keep Gram matrices, or input norms alone."),
    exclude_first_token: bool = typer.Option(False, "--exclude-first-token"),
    targets: str = typer.Option(None, help="Layers, name patterns joined by +."),
    ignore: str = typer.Option(None, help="Layers to leave out, name patterns joined by +."),
    block_path: str = typer.Option(None, help="Path of the list of decoder blocks."),
    tokenizer: str = typer.Option(None, help="Another tokenizer than that of the model."),
    revision: str = typer.Option("main", help="Branch, tag or commit of the model."),
    dtype: str = typer.Option("auto", help="Of the model."),
    device: str = typer.Option(None, help="Of the model."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code"),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Keep what the dense model sees of candidate sources, for draws and mixes without passes."""
    from pathlib import Path

    options: dict[str, Any] = dict(_extra_options(ctx, [f for f in _set_fields() if f != "fold"]))
    given = {"targets": targets, "ignore": ignore, "block_path": block_path}
    options |= {name: value for name, value in given.items() if value is not None}
    options["exclude_first_token"] = exclude_first_token

    from lm_calib_plugin.bank_commands import fill
    from lm_calib_plugin.calibrate import Loading
    from lm_calib_plugin.runtime import Runtime

    typer.echo(
        fill(
            _named("source", source),
            options,
            Loading(pretrained, tokenizer, revision, dtype, device, trust_remote_code),
            Path(out).expanduser(),
            folds=[fold.strip() for fold in folds.split(",") if fold.strip()],
            groups=groups,
            second_order=second_order,
            runtime=Runtime(progress=not quiet),
        )
    )


@app.command("draws", cls=_WithMethod, context_settings=_EXTRA)
def compare_draws(
    ctx: typer.Context,
    bank: str = typer.Argument(metavar="BANK", help="Folder made by lm-calib bank."),
    pretrained: str = typer.Option(..., help="The model that the bank was built with."),
    method: str = typer.Option(..., help="A name of lm-calib ls methods."),
    source: str = typer.Option(..., help="Name of a source in the bank."),
    nsamples: int = typer.Option(..., help="Sequences of a draw."),
    draws: int = typer.Option(200, help="How many."),
    rows: int = typer.Option(16, help="Output rows looked at in each layer; 0: all."),
    domain: list[str] = typer.Option([], help="Sources to judge on. Default: all."),  # noqa: B008
    fold: str = typer.Option("choose", help="Fold that draws are taken from."),
    judge_fold: str = typer.Option("judge", help="Fold that domains are judged on."),
    seed: int = typer.Option(0, help="Of the resampling."),
    out: str = typer.Option(None, help="Folder for draws.json and draws.png."),
    revision: str = typer.Option("main", help="Branch, tag or commit of the model."),
    dtype: str = typer.Option("auto", help="Of the model."),
    device: str = typer.Option(None, help="Of the model."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code"),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Say how much another draw of the calibration set would change, without a forward pass."""
    from pathlib import Path

    from lm_calib_plugin.recipe import Recipe
    from lm_calib_plugin.runtime import Runtime

    options: dict[str, Any] = dict(_extra_options(ctx, _method_fields()))
    recipe = Recipe(method=method, **options)

    from lm_calib_plugin.bank_commands import study_draws
    from lm_calib_plugin.calibrate import Loading

    typer.echo(
        study_draws(
            Path(bank).expanduser(),
            Loading(pretrained, None, revision, dtype, device, trust_remote_code),
            recipe,
            source,
            nsamples,
            domains=domain,
            fold=fold,
            judge_fold=judge_fold,
            draws=draws,
            rows=rows or None,
            seed=seed,
            out=Path(out).expanduser() if out else None,
            runtime=Runtime(progress=not quiet),
        )
    )


@app.command("ls")
def list_parts(what: _Listed) -> None:
    """List methods and what they are made of, calibration sources, or the options of a recipe."""
    from lm_calib_plugin.listing import print_list

    print_list(what.value)


@app.command()
def show(arguments: list[str]) -> None:
    """Check a recipe, given as KEY=VALUE,... or as a YAML file, and print it in full as YAML."""
    import yaml

    from lm_calib_plugin.recipe import Recipe

    given = _recipe_arguments(arguments)
    metadata = Recipe.from_model_args(given).to_metadata()
    typer.echo(yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True), nl=False)


@app.command()
def doctor(
    clean: bool = typer.Option(False, "--clean", help="Delete what interrupted writes left."),
) -> None:
    """Look at this installation: versions, the bridge to lm_eval, the cache, the devices."""
    from lm_calib_plugin.doctor import State, examine

    worst = 0
    for finding in examine(clean=clean):
        typer.echo(f"{finding.state.value:<8} {finding.what:<20} {finding.detail}")
        worst = max(worst, int(finding.state is State.PROBLEM))
    raise typer.Exit(worst)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what the user can mend ends in one line and exit code 2."""
    try:
        app(None if arguments is None else list(arguments), prog_name="lm-calib")
    except CalibError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None


# --- arguments of a recipe -------------------------------------------------------------------

# A comma inside a list or a quoted text is not followed by NAME=.
_SEPARATING_COMMA = re.compile(r",(?=\w+=|$)")


def _recipe_arguments(texts: Iterable[str]) -> dict[str, Any]:
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


def _named(what: str, texts: Iterable[str]) -> dict[str, str]:
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


def _set_fields() -> list[str]:
    """Return the recipe fields that ``calibrate`` takes beside its expression."""
    from lm_calib_plugin.recipe import Recipe

    return [name for name in Recipe.calibration_fields() if name != "calibration"]


def _method_fields() -> list[str]:
    """Return the recipe fields that are options of a method."""
    from lm_calib_plugin import registry

    rows = [*registry.table("pruning").values(), *registry.table("quantization").values()]
    return list(dict.fromkeys(name for row in rows for name in row.options))


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _extra_options(ctx: Any, names: Iterable[str]) -> dict[str, str]:
    """Read ``--field VALUE`` and ``--field=VALUE`` of recipe fields that a command also takes."""
    fields = {_flag(name): name for name in names}
    own = [flag for p in ctx.command.params for flag in p.opts if flag.startswith("--")]
    found: dict[str, str] = {}
    rest = list(ctx.args)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        flag = flag.replace("_", "-")
        if flag not in fields:
            raise UserError(
                flag,
                "unknown option",
                nearest(flag, [*fields, *own]),
                f"all options: lm-calib {ctx.command.name} --help",
            )
        if not equals and not rest:
            raise UserError(flag, "has no value", f"for instance {flag} VALUE")
        found[fields[flag]] = value if equals else rest.pop(0)
    return found
