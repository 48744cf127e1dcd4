"""Checks that every table carries: what must not differ does not."""

from __future__ import annotations

from collections.abc import Iterable

from lm_calib_plugin import comparison as stats
from lm_calib_plugin.leaderboard.board import Board
from lm_calib_plugin.leaderboard.collect import Arm
from lm_calib_plugin.leaderboard.records import Record
from lm_calib_plugin.leaderboard.tables import COMPRESSED, DATA_FREE, NULL, Control


def controls(board: Board) -> Iterable[Control]:
    """Yield every check with what came out of it."""
    for arm in board.arms:
        if arm.role == DATA_FREE and len(arm.records) > 1:
            one, *others = (arm.records[d] for d in sorted(arm.records))
            gaps = [gap for other in others for gap in _differences(one, other)]
            name = f"{arm.model}, {arm.method} {arm.level}, no data"
            said = f"draws of {arm.id} differ: {gaps[0]}" if gaps else "all draws are the same"
            yield Control(name, not gaps, said)
    for cell, before, again in board.found.repeats:
        name = f"{cell.model}, {cell.method} {cell.level}, {cell.calibration}, run twice"
        if before is None or again is None:
            yield Control(name, None, "not measured")
            continue
        gaps = _differences(before, again)
        said = f"two runs of {cell.title} differ: {gaps[0]}" if gaps else "identical"
        yield Control(name, not gaps, said)
    for arm in board.arms:
        if arm.role == NULL:
            yield from _null(board, arm)


def _null(board: Board, arm: Arm) -> Iterable[Control]:
    """Say how many calibrations with meaning one without it beats; no ground for refusal."""
    rivals = [
        a
        for a in board.arms
        if a.role == COMPRESSED
        and (a.model, a.level, a.method) == (arm.model, arm.level, arm.method)
    ]
    if not rivals:
        return
    for scale in board.headline():
        sign = 1 if scale.column.higher_is_better else -1
        own = sign * float(board.each(arm, scale).mean())
        beaten = sum(own > sign * float(board.each(a, scale).mean()) for a in rivals)
        yield Control(
            f"{arm.model}, {arm.method} {arm.level}, {arm.calibration}",
            None,
            f"without meaning, it scores above {beaten} of {len(rivals)} calibrations in "
            f"{scale.column.task}",
        )


def _differences(one: Record, other: Record) -> list[str]:
    """Return what two records that should be the same do not share."""
    found = []
    for name in ("key", "weights_digest"):
        pair = [(r.compression or {}).get(name) for r in (one, other)]
        if pair[0] != pair[1]:
            found.append(f"{name} {str(pair[0])[:12]} and {str(pair[1])[:12]}")
    for task, result in one.tasks.items():
        for name, metric in result.metrics.items():
            twin = other.tasks[task].metrics[name]
            if metric.value != twin.value:
                found.append(f"{task} {name} {metric.value} and {twin.value}")
            elif metric.items is not None and twin.items is not None and metric.items != twin.items:
                gap = stats.control_noise([metric.items, twin.items])
                found.append(f"{task} {name}, items by up to {gap:g}")
    return found
