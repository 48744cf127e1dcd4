"""What is given to the classes of this room: recipe fields checked at once, models by any name."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from lm_calib_plugin.builtin_models import resolve_pretrained
from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.guard import random_state_untouched
from lm_calib_plugin.recipe import Recipe, read_arguments, unknown_argument
from lm_calib_plugin.recipe_file import FILE_ARGUMENT
from lm_calib_plugin.registry import table
from lm_calib_plugin.report import Report
from lm_calib_plugin.runtime import RUNTIME_ARGUMENTS, Runtime

PRUNING = ("pruning",)
# A joint method ends on levels, too.
QUANTIZATION = ("quantization", "joint")
SHOWN_WARNINGS = 5


def read_fields(
    given: Mapping[str, Any], runtime: frozenset[str], also: tuple[str, ...] = ()
) -> tuple[Recipe, Runtime]:
    """Return recipe and runtime of keyword arguments; what is None was not given.

    Parameters
    ----------
    runtime
        The fields of :class:`~lm_calib_plugin.runtime.Runtime` that may be given.
    also
        Further arguments that the caller reads itself, for the spelling hint.

    Raises
    ------
    UserError
        For unknown names and for values that can not be used.
    """
    fields = {name: value for name, value in given.items() if value is not None}
    known = {*Recipe.model_fields, FILE_ARGUMENT, *runtime}
    for name in fields:
        if name in RUNTIME_ARGUMENTS and name not in runtime:
            raise UserError(
                name,
                "belongs to an evaluation or an export",
                f"beside the fields of a recipe: {listed(sorted({*runtime, *also}))}",
                f"drop `{name}`",
            )
        if name not in known:
            raise unknown_argument(name, {*known, *also})
    if isinstance(fields.get(FILE_ARGUMENT), Recipe):
        fields[FILE_ARGUMENT] = fields[FILE_ARGUMENT].to_metadata()
    return read_arguments(fields)


def check_plain(fields: Mapping[str, Any]) -> None:
    """Refuse the name of a file where a recipe was read from one: who wrote it chose the name.

    Raises
    ------
    UserError
        Unless the recipe, if there is one, is all there.
    """
    recipe = fields.get(FILE_ARGUMENT)
    if not isinstance(recipe, (Mapping, Recipe, type(None))):
        raise UserError(
            FILE_ARGUMENT,
            f"a configuration holds {recipe!r}",
            "the fields of a recipe themselves: nothing is read from other files",
        )


def check_kind(recipe: Recipe, kinds: tuple[str, ...], other: str) -> None:
    """Refuse a method of the wrong kind; ``other`` is what to use for it."""
    if recipe.entry.kind in kinds:
        return
    what = "prunes" if recipe.entry.kind == "pruning" else "quantizes"
    if recipe.entry.kind == "joint":
        what = "prunes and quantizes"
    right = [name for kind in kinds for name in table(kind)]  # type: ignore[arg-type]
    raise UserError(
        "method",
        f"`{recipe.method}` {what}",
        f"methods here: {listed(right)}",
        f"use {other}",
    )


def load_tokenizer(name: Any, **options: Any) -> Any:
    """Return a tokenizer by the name of its model; what is one already comes back.

    Raises
    ------
    UserError
        When there is none under that name.
    """
    if not isinstance(name, str):
        return name
    from transformers import AutoTokenizer

    with random_state_untouched():
        try:
            return AutoTokenizer.from_pretrained(resolve_pretrained(name), **options)
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                "tokenizer",
                f"none was found for `{name}` ({first_line(error)})",
                "a tokenizer, or the name or folder of one",
                "give tokenizer=",
            ) from None


def first_line(error: Exception) -> str:
    """Return the first line of a message of another library, cut to be quoted in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def tell(report: Report) -> None:
    """Say on stderr what was done, in one line, and the first warnings."""
    sys.stderr.write(f"lm-calib: {report.line()}\n")
    for note in report.warnings[:SHOWN_WARNINGS]:
        sys.stderr.write(f"lm-calib: warning: {note}\n")
    with contextlib.suppress(OSError):
        sys.stderr.flush()
