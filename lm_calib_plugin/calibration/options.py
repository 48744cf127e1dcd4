"""Options of a source, written after ``?`` in the calibration expression: typed and checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lm_calib_plugin.errors import UserError, listed, nearest

ARGUMENT = "calibration"


@dataclass(frozen=True)
class Option:
    """One option: its type, its default, and the values it takes.

    Parameters
    ----------
    kind
        ``"text"``, ``"whole"`` (an integer) or ``"number"`` (a finite float).
    default
        Value when the option is not given; None stands for "decided later".
    lowest, highest
        Bounds, included.
    above, below
        Bounds, excluded.
    choices
        The texts taken; empty: any.
    """

    kind: Literal["text", "whole", "number"] = "text"
    default: Any = None
    lowest: float | None = None
    highest: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    def read(self, text: str) -> Any:
        """Return the value of a text; raise ValueError when it is none."""
        if self.kind == "text":
            if not text or (self.choices and text not in self.choices):
                raise ValueError(text)
            return text
        number = float(text)
        whole = self.kind == "whole"
        if not math.isfinite(number) or (whole and number != int(number)) or self._outside(number):
            raise ValueError(text)
        return int(number) if whole else number

    def allowed(self) -> str:
        """Say in words which values are taken."""
        if self.kind == "text":
            return listed(self.choices) or "a text that is not empty"
        words = [
            f"{sign} {bound:g}"
            for sign, bound in (
                (">=", self.lowest),
                (">", self.above),
                ("<=", self.highest),
                ("<", self.below),
            )
            if bound is not None
        ]
        return ("a whole number " if self.kind == "whole" else "a number ") + " and ".join(words)

    def _outside(self, number: float) -> bool:
        return (
            (self.lowest is not None and number < self.lowest)
            or (self.highest is not None and number > self.highest)
            or (self.above is not None and number <= self.above)
            or (self.below is not None and number >= self.below)
        )


def read_options(
    source: str, table: Mapping[str, Option], given: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    """Return every option of ``table`` with its value, defaults filled in.

    Parameters
    ----------
    source
        Name of the source, for messages.
    table
        Option name -> what it takes.
    given
        Pairs of name and text, as typed.

    Raises
    ------
    UserError
        For an unknown name (with the nearest one), a name given twice, or a bad value.
    """
    values: dict[str, Any] = {name: option.default for name, option in table.items()}
    seen: set[str] = set()
    for name, text in given:
        if name not in table:
            raise UserError(
                ARGUMENT,
                f"`{source}` has no option `{name}`",
                nearest(name, table),
                f"its options: {listed(sorted(table)) or 'none'}",
            )
        if name in seen:
            raise UserError(ARGUMENT, f"`{name}` of `{source}` is given twice", fix="choose one")
        seen.add(name)
        try:
            values[name] = table[name].read(text)
        except ValueError:
            default = table[name].default
            raise UserError(
                ARGUMENT,
                f"`{name}` of `{source}`: got {text!r}",
                f"{table[name].allowed()} is needed",
                "" if default is None else f"for instance {source}?{name}={default}",
            ) from None
    return values
