"""One row of a table: scores with their errors, and what is left of the dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_calib_plugin import comparison as stats
from lm_calib_plugin.leaderboard.board import Board
from lm_calib_plugin.leaderboard.collect import Arm
from lm_calib_plugin.leaderboard.scale import Scale
from lm_calib_plugin.leaderboard.tables import POINTS, Entry, Kept, Score
from lm_calib_plugin.recipe import Recipe


def entry_of(board: Board, arm: Arm) -> Entry:
    """Return a row with all of its columns."""
    draws = tuple(sorted(arm.records))
    summaries = [arm.records[d].compression or {} for d in draws]
    achieved = summaries[0].get("achieved", {}) if summaries else {}
    data = [s["calibration"] for s in summaries if s.get("calibration")]
    strength, name = _strength(arm)
    loading = next(iter(arm.cells.values())).loading
    return Entry(
        id=arm.id,
        model=arm.model,
        level=arm.level,
        method=arm.method,
        calibration=arm.calibration,
        role=arm.role,
        draws=draws,
        scores={s.column.task: _score(board, arm, s) for s in board.scales} if draws else {},
        kept=_kept(board, arm) if draws else None,
        strength=strength,
        strength_name=name,
        sparsity=achieved.get("sparsity"),
        bits=achieved.get("bits_stored") or achieved.get("bits"),
        calib_ids=tuple(d["calib_id"] for d in data),
        calibration_tokens=data[0].get("tokens") if data else None,
        keys=tuple(s["key"] for s in summaries if "key" in s),
        leaked=_leaked(summaries),
        commands=tuple(cell.command() for cell in arm.cells.values()),
        failed=tuple(f"draw {d}: {e}" for d, e in arm.failed.items()),
        missing=arm.missing,
        dtype=str(loading.get("dtype") or ""),
        revision=str(loading.get("revision") or ""),
        warnings=tuple(dict.fromkeys(w for s in summaries for w in s.get("warnings", ()))),
    )


def _score(board: Board, arm: Arm, scale: Scale) -> Score:
    values = board.values[arm.id, scale.column.task]
    each = board.each(arm, scale)
    shown = [scale.shown(float(x)) for x in each]
    mean = scale.shown(float(each.mean()))
    error = None
    if values.table.ndim == 2:
        error = stats.item_error(values.table, **values.items)
    interval = _interval(board, arm, scale, float(each.mean()))
    spread = stats.draw_spread(shown).sd if len(shown) > 1 else None
    return Score(
        tuple(shown),
        mean,
        spread,
        None if error is None else scale.shown_error(error, mean),
        None if interval is None else scale.shown(scale.possible(interval.low)),
        None if interval is None else scale.shown(scale.possible(interval.high)),
    )


def _interval(board: Board, arm: Arm, scale: Scale, mean: float) -> stats.Interval | None:
    """Return the interval over draws and items; None where neither can vary."""
    values = board.values[arm.id, scale.column.task]
    count = len(values.labels)
    if values.table.ndim == 1 and count < 2:
        return None
    scores = board.resampled(arm, scale, values.labels, count)
    return board.resampling(arm, scale, count).interval(mean, scores)


def _kept(board: Board, arm: Arm) -> Kept | None:
    """Return what is left of the dense model, in tasks that it is better at than guessing."""
    dense = board.dense(arm)
    if dense is None:
        return None
    scores, full = board.means(arm, POINTS), board.means(dense, POINTS)
    chance = board.chance()
    able = [task for task in full if full[task] > chance.get(task, 0.0)]
    if not able:
        return None
    kept = stats.retention(
        {t: scores[t] for t in able}, {t: full[t] for t in able},
        {t: chance[t] for t in able if t in chance},
    )  # fmt: skip
    recovery = stats.recovery({t: scores[t] for t in able}, {t: full[t] for t in able})
    return Kept(
        kept.worst_domain, kept.worst, kept.geometric_mean, kept.mean, recovery.mean,
        dict(kept.domains),
    )  # fmt: skip


def _strength(arm: Arm) -> tuple[float | None, str]:
    """Return where a level stands on an axis: the fraction removed, or bits."""
    cell = next(iter(arm.cells.values()))
    if cell.recipe is None:
        return None, ""
    recipe = Recipe(**cell.recipe)
    if recipe.sparsity is not None:
        return recipe.sparsity, "fraction removed"
    if recipe.pattern not in (None, "unstructured"):
        kept, of = recipe.kept
        return 1 - kept / of, "fraction removed"
    for record in arm.records.values():
        bits = (record.compression or {}).get("achieved", {}).get("bits")
        if bits is not None:
            return float(bits), "bits"
    if isinstance(recipe.bits, int):
        return float(recipe.bits), "bits"
    return None, ""


def _leaked(summaries: Sequence[dict[str, Any]]) -> float | None:
    shares = []
    for summary in summaries:
        tasks = summary.get("leakage")
        if isinstance(tasks, dict):
            shares += [row.get("share", 0.0) for row in tasks.values() if isinstance(row, dict)]
    found = [s for s in shares if isinstance(s, (int, float)) and math.isfinite(s)]
    return max(found) if found else None
