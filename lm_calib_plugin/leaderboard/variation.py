"""What varies: rankings from one draw, shares of the variance, calibrations by domain."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm_calib_plugin import comparison as stats
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard.board import Board
from lm_calib_plugin.leaderboard.collect import Arm
from lm_calib_plugin.leaderboard.scale import Scale
from lm_calib_plugin.leaderboard.tables import (
    AVERAGES,
    DATA_FREE,
    PERPLEXITY,
    POINTS,
    Agreement,
    Heat,
    Ranking,
    Share,
    Shares,
)


def rankings(board: Board) -> list[Ranking]:
    """Return the rankings of calibrations for each method, and of methods for each calibration.

    Where a row has one draw, nobody knows what another would rank: there is no ranking then.
    """
    found = []
    for of in (lambda a: a.method, lambda a: a.calibration):
        for model, level, fixed, arms in board.groups(of):
            if len(arms) < 2:
                continue
            for scale in board.headline():
                if all(len(arm.records) > 1 for arm in arms):
                    found.append(_ranking(board, model, level, fixed, arms, scale))
    return found


def _ranking(
    board: Board, model: str, level: str, fixed: str, arms: list[Arm], scale: Scale
) -> Ranking:
    sign = 1 if scale.column.higher_is_better else -1
    draws = [sign * board.each(a, scale) for a in arms]
    order = sorted(range(len(arms)), key=lambda i: -float(draws[i].mean()))
    draws = [draws[i] for i in order]
    differ = len({float(d.mean()) for d in draws}) > 1
    return Ranking(
        model,
        level,
        fixed,
        scale.column.task,
        tuple(arms[i].id for i in order),
        stats.expected_tau(draws) if differ else None,
        tuple(tuple(float(x) for x in row) for row in stats.rank_stability(draws)),
    )


def agreements(board: Board) -> list[Agreement]:
    """Return how alike tasks, and levels, rank the calibrations of each method."""
    found = []
    tasks = [s for s in board.scales if s.column.task not in AVERAGES]
    by_method: dict[tuple[str, str], dict[str, list[Arm]]] = {}
    for model, level, method, arms in board.groups(lambda a: a.method):
        by_method.setdefault((model, method), {})[level] = arms
        scores = [[_mean(board, arm, scale) for scale in tasks] for arm in arms]
        names = tuple(scale.column.task for scale in tasks)
        found += _agreement(model, level, method, "tasks", names, scores)
    main = board.headline()[0]
    for (model, method), levels in by_method.items():
        each = [{a.calibration: a for a in arms} for arms in levels.values()]
        # Those that every level has.
        shared = [name for name in each[0] if all(name in arms for arms in each)]
        scores = [[_mean(board, arms[name], main) for arms in each] for name in shared]
        found += _agreement(model, "", method, "levels", tuple(levels), scores)
    return found


def _mean(board: Board, arm: Arm, scale: Scale) -> float:
    """Return the mean score of a row, more being better."""
    mean = float(board.each(arm, scale).mean())
    return mean if scale.column.higher_is_better else -mean


def _agreement(
    model: str, level: str, fixed: str, over: str, names: tuple[str, ...], scores: Any
) -> list[Agreement]:
    if len(scores) < 2 or len(names) < 2:
        return []
    taus = stats.tau_between(scores)
    # A column whose rows all tie ranks nothing.
    rows = tuple(tuple(None if np.isnan(t) else float(t) for t in row) for row in taus)
    return [Agreement(model, level, fixed, over, names, rows)]


def shares(board: Board) -> list[Shares]:
    """Return what the variance of each table consists of."""
    found = []
    for model, level, _, arms in board.groups(lambda a: ""):
        sources = list(dict.fromkeys(a.calibration for a in arms))
        methods = list(dict.fromkeys(a.method for a in arms))
        place = {(a.calibration, a.method): a for a in arms}
        for scale in board.headline():
            draws = [
                [
                    board.each(place[s, m], scale) if (s, m) in place else np.array([])
                    for m in methods
                ]
                for s in sources
            ]
            one = _split(board, model, level, scale, draws)
            found += [one] if one is not None else []
    return found


def _split(board: Board, model: str, level: str, scale: Scale, draws: Any) -> Shares | None:
    if len(draws) * len(draws[0]) < 2 or max(len(c) for row in draws for c in row) < 2:
        return None
    try:
        parts = stats.variance_components(draws)
    except UserError:
        # Nothing varies, or the table is too thin to tell anything apart.
        return None
    naive: dict[str, float] = {}
    if all(len(cell) > 1 for row in draws for cell in row):
        plain = stats.variance_shares_of_draws(draws)
        naive = {n: getattr(plain, n) for n in ("source", "method", "interaction", "draw")}
    return Shares(
        model,
        level,
        scale.column.task,
        parts.estimator,
        {
            name: Share(share.value, share.low, share.high, name in parts.truncated)
            for name, share in parts.shares.items()
        },
        naive,
    )


def heats(board: Board) -> list[Heat]:
    """Return calibration by task for each method, points and perplexities apart."""
    found = []
    for model, level in board.tables:
        arms = board.rows(model, level)
        for method in dict.fromkeys(a.method for a in arms if a.role != DATA_FREE):
            rows = [a for a in arms if a.method == method]
            dense = board.dense(rows[0])
            if dense is None:
                continue
            for unit, quantity in ((POINTS, "retention"), (PERPLEXITY, "log ratio")):
                heat = _heat(board, rows, dense, unit, quantity)
                found += [heat] if heat is not None else []
    return found


def _heat(board: Board, rows: list[Arm], dense: Arm, unit: str, quantity: str) -> Heat | None:
    full, chance = board.means(dense, unit), board.chance()
    tasks = tuple(full)
    if not tasks:
        return None
    values = []
    for arm in rows:
        own = board.means(arm, unit)
        line: list[float | None] = []
        for task in tasks:
            room = full[task] - chance.get(task, 0.0)
            if unit == PERPLEXITY:
                line.append(own[task] - full[task])
            else:
                line.append((own[task] - chance.get(task, 0.0)) / room if room > 0 else None)
        values.append(tuple(line))
    first = rows[0]
    return Heat(
        first.model, first.level, first.method, quantity,
        tuple(a.calibration for a in rows), tasks, tuple(values),
    )  # fmt: skip
