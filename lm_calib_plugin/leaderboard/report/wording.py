"""Numbers and names as people read them; Markdown and page say the same words."""

from __future__ import annotations

import math
from typing import Any

from lm_calib_plugin.leaderboard.tables import (
    DATA_FREE,
    DENSE,
    POINTS,
    Column,
    Comparison,
    Entry,
    Score,
)

NOTHING = "–"
NO_PLOTS = "Plots are left out, as matplotlib is not installed."
INSTALL_PLOTS = "pip install 'lm-calib-plugin[plots]'"
MINUS = "−"


def decimals(value: float, unit: str) -> int:
    """Return how many decimals a score has: two for points, else four digits in all."""
    if unit == POINTS or unit.startswith("%"):
        return 2
    whole = len(str(int(abs(value)))) if 1 <= abs(value) < math.inf else 0
    return min(4, max(0, 4 - whole))


def number(
    value: float | None, unit: str = POINTS, *, signed: bool = False, like: float | None = None
) -> str:
    """Return a score or a difference; ``like`` is the number whose decimals it has."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    shown = decimals(value if like is None or not math.isfinite(like) else like, unit)
    text = f"{abs(value):.3g}" if abs(value) >= 1e6 else f"{abs(value):.{shown}f}"
    zero = not text.strip("0.")
    sign = "" if zero else MINUS if value < 0 else "+" if signed else ""
    return sign + text


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share, given as a fraction."""
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{abs(value) * 100:.{digits}f}"
    return (MINUS if value < 0 and text.strip("0.") else "") + text + " %"


def interval(
    low: float | None,
    high: float | None,
    unit: str = POINTS,
    *,
    signed: bool = False,
    like: float | None = None,
) -> str:
    """Return a 95 % interval in brackets, a dash where there is none."""
    if low is None or high is None:
        return NOTHING
    bounds = (number(bound, unit, signed=signed, like=like) for bound in (low, high))
    return f"[{', '.join(bounds)}]"


def draws(count: int) -> str:
    """Return a number of draws in words."""
    return "1 draw" if count == 1 else f"{count} draws"


def spread(score: Score, unit: str) -> str:
    """Return the standard deviation over draws, never without their number."""
    if score.sd is None:
        return draws(len(score.draws))
    return f"sd {number(score.sd, unit, like=score.mean)}, {draws(len(score.draws))}"


def probability(value: float | None) -> str:
    """Return a p value or a probability."""
    if value is None:
        return NOTHING
    return "< 0.001" if 0 <= value < 0.001 else f"{value:.3f}"


def name(entry: Entry) -> str:
    """Return what tells a row from others of its table: method and calibration."""
    return " · ".join(_parts(entry)) or entry.role


def phrase(entry: Entry) -> str:
    """Return the same as part of a sentence."""
    return "the dense model" if entry.role == DENSE else " on ".join(_parts(entry))


def calibration(entry: Entry) -> str:
    """Return the calibration of a row, nothing where the method takes no data."""
    return "" if entry.role in (DENSE, DATA_FREE) else entry.calibration


def _parts(entry: Entry) -> list[str]:
    return [part for part in (entry.method, calibration(entry)) if part]


def heading(column: Column) -> str:
    """Return the heading of a column, without its unit."""
    return column.task


def meaning(column: Column) -> str:
    """Return metric, unit, direction, items and chance of a column."""
    parts = [column.metric, column.unit if column.unit != column.metric else ""]
    parts.append("higher is better" if column.higher_is_better else "lower is better")
    parts.append(f"{column.items} items" if column.items is not None else "")
    if column.chance is not None:
        parts.append(f"chance {percent(column.chance)}")
    return ", ".join(part for part in parts if part)


def verdict(pair: Comparison) -> str:
    """Return the kind of a verdict as words."""
    return pair.verdict.replace("_", " ")


def flips(pair: Comparison) -> str:
    """Return the shares of items on which a is better and worse."""
    if pair.beneficial is None or pair.harmful is None:
        return NOTHING
    return f"{percent(pair.beneficial)} / {percent(pair.harmful)}"


def value(thing: Any) -> str:
    """Return a condition as text."""
    if isinstance(thing, dict):
        return ", ".join(f"{key}: {value(part)}" for key, part in thing.items())
    if isinstance(thing, (list, tuple)):
        return ", ".join(value(part) for part in thing)
    if thing is None:
        return "not set"
    return {True: "yes", False: "no"}[thing] if isinstance(thing, bool) else str(thing)
