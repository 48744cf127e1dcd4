"""Numbers and names as people read them; Markdown and page say the same words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lm_calib_plugin.leaderboard.tables import (
    DATA_FREE,
    DENSE,
    POINTS,
    VERSIONED,
    Agreement,
    Analysis,
    Column,
    Comparison,
    Control,
    Entry,
    Score,
)

NOTHING = "–"
# Scores beyond say no more than that a model is broken; files for programs have them in full.
HUGE = 1e6
# Numbers that lie further apart than this factor are drawn by their logarithms.
WIDE = 100.0
AGAINST = {
    "dense": "the dense model",
    "baseline": "the baseline calibration",
    "method": "another method",
}
COMPARISONS = (
    "Differences are paired by draw and item and stand with their 95 % intervals in brackets."
    " Better / worse: the items on which a is better and worse. P(a better): the chance that one"
    " draw of a is better than one of b. p is adjusted by Holm within"
    " a model, level, column and kind of partner."
)
AGREEMENTS = (
    "Whether tasks, and levels, rank the calibrations of a method alike, by the means over draws:"
    " Kendall tau-b (+1: the same ranking, 0: nothing in common, −1: the reverse; a dash where one"
    " ranks nothing). Few calibrations agree easily by accident."
)
RANKINGS = (
    "How well the ranking of single draws tells that of the means: expected Kendall tau-b"
    " (1: always the same, 0: not at all), and how often one draw puts the first row first."
)
MINUS = "−"
# How the words of a control by a null calibration begin.
_NULL = "without meaning, it scores above "


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


def short(
    value: float | None, unit: str = POINTS, *, signed: bool = False, like: float | None = None
) -> str:
    """Return a number for a table, where a huge one is only said to be that."""
    if value is not None and HUGE <= abs(value) < math.inf:
        return f"> {HUGE:.0e}".replace("e+0", "e") if value > 0 else f"< {MINUS}1e6"
    return number(value, unit, signed=signed, like=like)


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
    write: Callable[..., str] = number,
) -> str:
    """Return two bounds in brackets, a dash where there are none."""
    if low is None or high is None:
        return NOTHING
    written = (write(bound, unit, signed=signed, like=like) for bound in (low, high))
    return f"[{', '.join(written)}]"


def bounds(score: Score, unit: str) -> str:
    """Return the interval of a score for a table; nothing where it says nothing."""
    low, high = score.low, score.high
    if low is None or high is None or low == high or low >= HUGE:
        return ""
    return interval(low, high, unit, like=score.mean, write=short)


def extremes(score: Score) -> tuple[float | None, float | None]:
    """Return the least and the largest score of a draw."""
    return min(score.draws, default=None), max(score.draws, default=None)


def is_wide(values: Iterable[float]) -> bool:
    """Tell whether numbers span so much that only their logarithms can be drawn."""
    found = list(values)
    return bool(found) and min(found) > 0 and max(found) > WIDE * min(found)


def draws(count: int) -> str:
    """Return a number of draws in words."""
    return "1 draw" if count == 1 else f"{count} draws"


def spread(score: Score, unit: str, *, full: bool = False) -> str:
    """Return the standard deviation over draws, never without their number."""
    count = draws(len(score.draws))
    if score.sd is None:
        return count
    if len(set(score.draws)) == 1 and len(score.draws) > 1:
        return f"{count}, all the same"
    return f"sd {(number if full else short)(score.sd, unit, like=score.mean)}, {count}"


def probability(value: float | None) -> str:
    """Return a p value or a probability."""
    if value is None:
        return NOTHING
    return "< 0.001" if 0 <= value < 0.001 else f"{value:.3f}"


def name(entry: Entry) -> str:
    """Return what tells a row from others of its table: method and calibration."""
    return _joined(entry, " · ")


def phrase(entry: Entry) -> str:
    """Return the same as part of a sentence."""
    return "the dense model" if entry.role == DENSE else _joined(entry, " on ")


def calibration(entry: Entry) -> str:
    """Return the calibration of a row, nothing where the method takes no data."""
    if entry.role in (DENSE, DATA_FREE) or entry.calibration == "none":
        return ""
    return entry.calibration


def _joined(entry: Entry, between: str) -> str:
    if entry.role == DENSE:
        return "dense"
    method = entry.method or entry.role
    if entry.role == DATA_FREE:
        return f"{method}, without data"
    return between.join(part for part in (method, calibration(entry)) if part)


def legend(analysis: Analysis, column: Column | None) -> str:
    """Return how the tables are read; ``column`` is the one that ranks are told by."""
    order = "Rows stand as in the grid. "
    if not analysis.no_ranking:
        order = "Rows are sorted by the retention of their worst task, then by the geometric mean. "
        if all(e.kept is None or e.kept.worst is None for e in analysis.entries):
            order = "Rows are sorted by their means, best first. "
        if column is not None:
            order += (
                f"Ranks are told by {heading(column)}, as far as differences in it are resolved:"
                " 1–3 says that none tells more. "
            )
    scores = (score for entry in analysis.entries for score in entry.scores.values())
    huge = any(value is not None and value >= HUGE for s in scores for value in (s.mean, s.high))
    text = order + (
        "Retention is (score − chance) / (dense − chance). With each mean: sd, the standard"
        " deviation over draws, and the number of draws; in brackets the 95 % interval over draws"
        " and items."
    )
    return text + (" Numbers above 1e6 stand in full in leaderboard.csv." if huge else "")


def agreement(found: Agreement) -> str:
    """Return what rankings are compared: model, level, method, and over what."""
    places = [part for part in (found.model, found.level, found.fixed) if part]
    return f"{' · '.join(places)}, {found.over} with {found.over}"


def tau(value: float | None) -> str:
    """Return a Kendall tau-b."""
    return NOTHING if value is None else number(value, signed=True)


def shares(analysis: Analysis) -> str:
    """Return how shares of the variance are read."""
    estimators = ", ".join(dict.fromkeys(shares.estimator for shares in analysis.shares))
    return (
        "Shares of the variance of one draw's score with their 95 % intervals (estimator:"
        f" {estimators}). Naive: not corrected for the noise of draws, as papers print them."
    )


def conditions(analysis: Analysis) -> list[tuple[str, str]]:
    """Return under which conditions records were made; those not shared by all say so."""
    found = []
    for key, thing in analysis.conditions.items():
        text = value(thing)
        several = key in VERSIONED and isinstance(thing, str) and ", " in thing
        found.append((key, f"{text} (not the same for all records)" if several else text))
    return found


def controls(found: Sequence[Control]) -> list[Control]:
    """Return controls; those of null calibrations are one line a method and level.

    Such a control judges nothing, and its name is method and level, a comma and the calibration.
    """
    lines: dict[str, dict[str, list[str]]] = {}
    for control in found:
        head, _, tail = control.name.rpartition(", ")
        if control.passed is None and head and control.words.startswith(_NULL):
            lines.setdefault(head, {}).setdefault(tail, []).append(control.words[len(_NULL) :])
    shown = []
    for control in found:
        head = control.name.rpartition(", ")[0]
        if control.passed is None and control.words.startswith(_NULL) and head in lines:
            said = [f"{name} {', '.join(words)}" for name, words in lines.pop(head).items()]
            words = f"calibrations without meaning score above: {'; '.join(said)}"
            shown.append(Control(f"{head}, null", None, words))
        elif not (control.passed is None and control.words.startswith(_NULL) and head):
            shown.append(control)
    return shown


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


def turns(pair: Comparison) -> str:
    """Return a remark where draws disagree on the winner."""
    return "⇄ the winner changes with the draw" if pair.flips else ""


def items(pair: Comparison) -> str:
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
