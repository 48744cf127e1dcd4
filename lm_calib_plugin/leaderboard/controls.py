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
        if arm.role == DATA_FREE and len(arm.cells) > 1:
            one, *others = (arm.records.get(draw) for draw in sorted(arm.cells))
            name = f"{arm.model}, {arm.method} {arm.level}, no data"
            for other in others:
                yield _same(name, one, other, f"runs of {arm.id}")
    for cell, before, again in board.found.repeats:
        name = f"{cell.model}, {cell.method} {cell.level}, {cell.calibration}, run twice"
        yield _same(name, before, again, f"two runs of {cell.title}")
    for arm in board.arms:
        if arm.role == NULL:
            yield from _null(board, arm)


def _same(name: str, one: Record | None, other: Record | None, what: str) -> Control:
    """Return the check that two records that should be the same are."""
    if one is None or other is None:
        return Control(name, None, "not measured")
    gaps = _differences(one, other)
    if not gaps:
        return Control(name, True, "identical, bit by bit")
    words = f"{what} differ: {gaps[0]}"
    made = [_machine(record) for record in (one, other)]
    if made[0] != made[1]:
        words += f"; made on {made[0]}, and on {made[1]}"
    return Control(name, False, words)


def _machine(record: Record) -> str:
    facts = {**record.costs.get("machine", {}), **record.costs.get("versions", {})}
    return ", ".join(f"{name} {value}" for name, value in sorted(facts.items()))


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
