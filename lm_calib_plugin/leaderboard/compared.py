"""Rows against each other: dense, the baseline calibration, the first method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lm_calib_plugin import comparison as stats
from lm_calib_plugin.leaderboard.board import Board
from lm_calib_plugin.leaderboard.collect import Arm
from lm_calib_plugin.leaderboard.scale import Scale, Values
from lm_calib_plugin.leaderboard.tables import DATA_FREE, DENSE, Comparison

MARGIN = 0.02  # two points of accuracy, or two percent of a perplexity
NOISY = "implementation_noise"


def comparisons(board: Board) -> list[Comparison]:
    """Return every row against dense, the baseline and the first method, in every column.

    p values are adjusted within a model and level.
    """
    found: list[Comparison] = []
    for model, level in board.tables:
        table: list[Comparison] = []
        arms = board.rows(model, level)
        for against, pairs in _pairs(board, arms):
            for a, b in pairs:
                for scale in board.scales:
                    one = _compared(board, a, b, against, scale)
                    table += [one] if one is not None else []
        adjusted = stats.holm([one.p for one in table])
        found += [replace(o, p_holm=p) for o, p in zip(table, adjusted, strict=True)]
    return found


def _pairs(board: Board, arms: list[Arm]) -> list[tuple[str, list[tuple[Arm, Arm]]]]:
    """Return pairs against dense, the baseline calibration, and the first method."""
    dense = board.dense(arms[0]) if arms else None
    base = board.grid.baseline
    by_place = {(a.method, a.calibration): a for a in arms}
    first = next(iter(board.grid.methods))
    others = []
    for a in arms:
        b = by_place.get((a.method, str(base)))
        if b is not None and b is not a:
            others.append((a, b))
    methods = []
    for a in arms:
        b = by_place.get((first, a.calibration if a.role != DATA_FREE else str(base)))
        if b is not None and a.method != first:
            methods.append((a, b))
    return [
        ("dense", [(a, dense) for a in arms] if dense is not None else []),
        ("baseline", others),
        ("method", methods),
    ]


def _compared(board: Board, a: Arm, b: Arm, against: str, scale: Scale) -> Comparison | None:
    task = scale.column.task
    one, other = board.values[a.id, task], board.values[b.id, task]
    free = {name for name, arm in (("a", a), ("b", b)) if arm.role in (DENSE, DATA_FREE)}
    arms = _paired(one, other, free)
    if arms is None:
        return None
    first, second = arms
    weights = one.weights
    options: dict[str, Any] = {"weights": weights}
    said = stats.verdict(
        first,
        second,
        data_free=free,
        higher_is_better=scale.column.higher_is_better,
        margin=MARGIN,
        units=scale.units,
        **options,
    )
    noisy = [
        arm.id
        for arm in (a, b)
        if arm.role == DATA_FREE and not _constant(board.values[arm.id, task])
    ]
    if noisy:
        said = stats.Verdict(NOISY, f"implementation noise: draws of {noisy[0]} differ", None)
    one_wide, other_wide = np.broadcast_arrays(first, second)
    delta = stats.paired_delta(one_wide, other_wide, expanded=True, **options)
    sign = 1 if scale.column.higher_is_better else -1
    wins = stats.probability_better(
        sign * stats.item_scores(first, weights), sign * stats.item_scores(second, weights)
    )
    factor = scale.units.scale
    has_error = first.ndim == 2 or len(first) > 1
    gains = (delta.better, delta.worse) if sign > 0 else (delta.worse, delta.better)
    return Comparison(
        a.id,
        b.id,
        against,
        task,
        scale.units.name,
        delta.delta.value * factor,
        delta.delta.low * factor if has_error else None,
        delta.delta.high * factor if has_error else None,
        gains[0] if first.ndim == 2 else None,
        gains[1] if first.ndim == 2 else None,
        stats.p_value(one_wide, other_wide, weights),
        None,
        wins,
        said.kind,
        said.words,
        said.more_draws,
    )


def _paired(one: Values, other: Values, free: set[str]) -> tuple[Any, Any] | None:
    """Return both arms over equal draws; one row of what takes no data, for every draw."""
    if one.table.ndim != other.table.ndim:
        return None
    if free:
        a, b = one.table, other.table
        return a[:1] if "a" in free else a, b[:1] if "b" in free else b
    shared = [draw for draw in one.labels if draw in other.labels]
    return (one.of(shared), other.of(shared)) if shared else None


def _constant(values: Values) -> bool:
    return bool((values.table == values.table[0]).all())
