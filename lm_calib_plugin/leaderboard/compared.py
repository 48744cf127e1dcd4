"""Rows against each other: dense, the baseline calibration, the first method."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lm_calib_plugin import comparison as stats
from lm_calib_plugin.leaderboard.board import Board, Draws
from lm_calib_plugin.leaderboard.collect import Arm
from lm_calib_plugin.leaderboard.scale import Scale, Values
from lm_calib_plugin.leaderboard.tables import DATA_FREE, DENSE, PERPLEXITY, POINTS, Comparison

MARGIN = 0.02  # two points of accuracy, or two percent of a perplexity
WITH_MARGIN = (POINTS, PERPLEXITY)
ALPHA = 0.05
NOISY = "implementation_noise"
RESOLVED, ON_AVERAGE = "resolved_", "_on_average"


def comparisons(board: Board) -> list[Comparison]:
    """Return every row against dense, the baseline and the first method, in every column.

    p values are adjusted within a list that is read as one: those of a model and level, against
    one kind of partner, in one column. Nothing is resolved that they do not resolve.
    """
    found: list[Comparison] = []
    # Column by column, as all comparisons of one share their resamples.
    places = [
        (model, level, against, a, b)
        for model, level in board.tables
        for against, pairs in _pairs(board, board.rows(model, level))
        for a, b in pairs
    ]
    columns = [
        [_compared(board, a, b, against, scale) for *_, against, a, b in places]
        for scale in board.scales
    ]
    for table in board.tables:
        ones = [
            column[number]
            for number, (model, level, *_) in enumerate(places)
            if (model, level) == table
            for column in columns
        ]
        found += _adjusted([one for one in ones if one is not None])
    return found


def _holm(table: list[Comparison]) -> list[tuple[float | None, int]]:
    """Return the adjusted p value of each comparison, and over how many it was adjusted."""
    lists: dict[tuple[str, str], list[int]] = {}
    for number, one in enumerate(table):
        lists.setdefault((one.against, one.column), []).append(number)
    found: list[tuple[float | None, int]] = [(None, 0)] * len(table)
    for numbers in lists.values():
        adjusted = stats.holm([table[number].p for number in numbers])
        tested = sum(p is not None for p in adjusted)
        for number, p in zip(numbers, adjusted, strict=True):
            found[number] = p, tested
    return found


def _adjusted(table: list[Comparison]) -> list[Comparison]:
    """Return comparisons with p values after Holm, and verdicts that do not say more than they."""
    found = []
    for one, (p, tested) in zip(table, _holm(table), strict=True):
        one = replace(one, p_holm=p)
        if p is not None and p >= ALPHA:
            over = f"not resolved after Holm over {tested} comparisons (p = {p:.2f})"
            if one.verdict.startswith(RESOLVED):
                word = one.verdict.removeprefix(RESOLVED)
                rest = one.words.removeprefix(f"resolved, {word}: ")
                one = replace(
                    one, verdict=f"likely_{word}", words=f"likely {word}, {over}: {rest}",
                    more_draws=None,
                )  # fmt: skip
            elif one.verdict.endswith(ON_AVERAGE):
                one = replace(one, words=f"{one.words}; {over}", more_draws=None)
        found.append(one)
    return found


def _pairs(board: Board, arms: list[Arm]) -> list[tuple[str, list[tuple[Arm, Arm]]]]:
    """Return pairs against dense, the baseline calibration, and the first method."""
    dense = board.dense(arms[0]) if arms else None
    base = board.grid.baseline
    by_place = {(a.method, a.calibration): a for a in arms}
    others = [(a, by_place.get((a.method, str(base)))) for a in arms]
    # Of this table: not every method is there at every level.
    there = [a for a in arms if a.role != DATA_FREE] or arms
    first = there[0].method if there else ""
    beside = base if (first, base) in by_place else next((a.calibration for a in there), None)
    methods = []
    for a in arms:
        where = a.calibration if (first, a.calibration) in by_place else beside
        same = a.role == DATA_FREE or where == a.calibration
        if a.method != first and same:
            methods.append((a, by_place.get((first, str(where)))))
    return [
        ("dense", [(a, dense) for a in arms] if dense is not None else []),
        ("baseline", [(a, b) for a, b in others if b is not None and b is not a]),
        ("method", [(a, b) for a, b in methods if b is not None]),
    ]


def _compared(board: Board, a: Arm, b: Arm, against: str, scale: Scale) -> Comparison | None:
    task = scale.column.task
    one, other = board.values[a.id, task], board.values[b.id, task]
    free = {name for name, arm in (("a", a), ("b", b)) if arm.role in (DENSE, DATA_FREE)}
    draws = _paired(one, other, free)
    if draws is None:
        return None
    first, second = one.of(draws[0]), other.of(draws[1])
    one_wide, other_wide = np.broadcast_arrays(first, second)
    count = len(one_wide)
    gaps = one_wide - other_wide
    items = one.items
    # Equal resamples for all rows of a column; both intervals come from them.
    taken = board.resampling(a, scale, count)
    moved = (
        board.resampled(a, scale, draws[0], count),
        board.resampled(b, scale, draws[1], count),
    )
    value = float(stats.item_scores(gaps, one.weights).mean())
    delta, narrow = (taken.interval(value, *moved, c) for c in (0.95, 0.9))
    said = stats.verdict(
        first,
        second,
        data_free=free,
        higher_is_better=scale.column.higher_is_better,
        margin=MARGIN if scale.column.unit in WITH_MARGIN else None,
        intervals=(delta, narrow),
        units=scale.units,
        **items,
    )
    noisy = [
        arm.id
        for arm in (a, b)
        if arm.role == DATA_FREE and not _constant(board.values[arm.id, task])
    ]
    if noisy:
        said = stats.Verdict(NOISY, f"implementation noise: draws of {noisy[0]} differ", None)
    sign = 1 if scale.column.higher_is_better else -1
    scores = [sign * stats.item_scores(arm, one.weights) for arm in (first, second)]
    factor = scale.units.scale
    has_error = first.ndim == 2 or count > 1
    better, worse = (float((sign * gaps > 0).mean()), float((sign * gaps < 0).mean()))
    return Comparison(
        a.id,
        b.id,
        against,
        task,
        scale.units.name,
        value * factor,
        delta.low * factor if has_error else None,
        delta.high * factor if has_error else None,
        better if first.ndim == 2 else None,
        worse if first.ndim == 2 else None,
        stats.p_value(one_wide, other_wide, **items),
        None,
        stats.probability_better(*scores),
        said.kind,
        said.words,
        said.more_draws,
        stats.winner_flips(*np.broadcast_arrays(*scores)) if count > 1 else None,
    )


def _paired(one: Values, other: Values, free: set[str]) -> tuple[Draws, Draws] | None:
    """Return equal draws of both arms; one of what takes no data, which stands for every draw."""
    if not free:
        shared = tuple(draw for draw in one.labels if draw in other.labels)
        return (shared, shared) if shared else None
    return (
        one.labels[:1] if "a" in free else one.labels,
        other.labels[:1] if "b" in free else other.labels,
    )


def _constant(values: Values) -> bool:
    return bool((values.table == values.table[0]).all())
