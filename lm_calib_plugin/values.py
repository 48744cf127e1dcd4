"""Checked reading of single argument values, however a parser delivers them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lm_calib_plugin.errors import UserError, listed, nearest

DENSE_BITS = 16
BITS = (2, 3, 4, 5, 6, 7, 8, DENSE_BITS)


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


def width(argument: str, value: Any, dense: str = "no quantization at all") -> int:
    """Return a number of bits; 16 stands for ``dense``."""
    need = f"2-8 bits, or {DENSE_BITS} for {dense}"
    found = number(argument, value, need)
    if found not in BITS:
        raise UserError(argument, f"got {value}", need)
    return int(found)


def group_size(argument: str, value: Any) -> int:
    """Return a number of consecutive inputs that share a scale, or -1 for all of them."""
    need = "a positive number of inputs, or -1 for one scale per output channel"
    found = number(argument, value, need)
    if found != int(found) or (found != -1 and found < 1):
        raise UserError(argument, f"got {value}", need)
    return int(found)


# What a pattern of `overrides` may set for the layers that it names.
OVERRIDES = {"bits": width, "group_size": group_size, "symmetric": flag}


def overrides(value: Any) -> dict[str, dict[str, Any]]:
    """Return options by name pattern, from a mapping or from JSON."""
    example = 'for instance overrides: {"*down_proj": {"bits": 4}}'
    need = "name patterns, each with its options, in YAML or JSON"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError("overrides", f"got {value!r}", need, example) from None
    if not isinstance(value, Mapping) or not value:
        raise UserError("overrides", f"got {value!r}", need, example)
    found: dict[str, dict[str, Any]] = {}
    for pattern, options in value.items():
        if not isinstance(options, Mapping) or not options:
            raise UserError("overrides", f"got {options!r} for {pattern!r}", need, example)
        own = found[patterns("overrides", [pattern])[0]] = {}
        for name, given in options.items():
            if name not in OVERRIDES:
                raise UserError(
                    "overrides",
                    f"got `{name}` for {pattern!r}; " + nearest(str(name), OVERRIDES),
                    f"options of a pattern: {listed(OVERRIDES)}",
                    example,
                )
            try:
                own[name] = OVERRIDES[name](name, given)
            except UserError as error:
                raise UserError("overrides", f"{pattern!r}: {error}") from None
    return found


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
