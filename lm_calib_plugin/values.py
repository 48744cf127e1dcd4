"""Checked reading of single argument values, however a parser delivers them."""

from __future__ import annotations

import math
from typing import Any

from lm_calib_plugin.errors import UserError


def number(argument: str, value: Any, need: str = "a number is needed") -> float:
    """Return a finite float, or raise; booleans and texts that are no numbers are refused."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(argument, f"got {value!r}", need)
    return found + 0.0  # -0.0 becomes 0.0


def whole(argument: str, value: Any, lowest: int | None = None) -> int:
    """Return an integer; ``1e3`` is 1000, ``1.5`` is refused."""
    need = "a whole number" + ("" if lowest is None else f" >= {lowest}") + " is needed"
    found = number(argument, value, need)
    if found != int(found) or (lowest is not None and found < lowest):
        raise UserError(argument, f"got {value!r}", need)
    # An integer is kept as it is: large ones lose digits as a float.
    return value if isinstance(value, int) else int(found)


def flag(argument: str, value: Any) -> bool:
    """Return a boolean; the texts true, false, yes, no, 1 and 0 are read."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "1", "yes"):
        return True
    if text in ("false", "0", "no"):
        return False
    raise UserError(argument, f"got {value!r}", "true or false is needed")


def patterns(argument: str, value: Any) -> tuple[str, ...]:
    """Return name patterns from a text joined by ``+`` or from a list."""
    parts = value.split("+") if isinstance(value, str) else value
    texts = isinstance(parts, (list, tuple)) and all(isinstance(p, str) for p in parts)
    if not texts or not all(p.strip() for p in parts) or (argument == "targets" and not parts):
        raise UserError(
            argument, f"got {value!r}", "name patterns joined by +", "for instance *q_proj+*mlp*"
        )
    return tuple(p.strip() for p in parts)


def plain_value(value: Any) -> Any:
    """Undo what argument parsers leave behind: an empty text and ``"null"`` become None."""
    if isinstance(value, str) and value.strip().lower() in ("null", ""):
        return None
    return value
