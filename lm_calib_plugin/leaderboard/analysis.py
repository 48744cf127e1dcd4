"""From records to everything that a report shows, by the statistics of ``comparison``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard.board import Board
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.collect import collect
from lm_calib_plugin.leaderboard.compared import comparisons
from lm_calib_plugin.leaderboard.controls import controls
from lm_calib_plugin.leaderboard.grid import Grid
from lm_calib_plugin.leaderboard.records import Record, Records
from lm_calib_plugin.leaderboard.rows import entry_of
from lm_calib_plugin.leaderboard.scale import scales_of
from lm_calib_plugin.leaderboard.tables import (
    AVERAGE,
    DATA_FREE,
    DENSE,
    PERPLEXITY,
    POINTS,
    VERSIONED,
    Analysis,
)
from lm_calib_plugin.leaderboard.variation import agreements, heats, rankings, shares

NOISE = "implementation noise"


def analyze(grid: Grid, cells: Sequence[Cell], records: Records) -> Analysis:
    """Return what the records of a grid say.

    Raises
    ------
    UserError
        When nothing was measured, records were made under different conditions, or a metric of the
        grid is not one of its task.
    """
    found = collect(cells, records)
    first = next((r for arm in found.arms for r in arm.records.values()), None)
    if first is None:
        raise UserError("grid", "no cell is measured yet", fix="lm-calib leaderboard run first")
    scales = scales_of(grid.tasks, first.tasks, grid.metrics, grid.chance)
    board = Board(grid, found, scales)
    checks = tuple(controls(board))
    missing = [arm.cells[d].title for arm in found.arms for d in arm.missing]
    broken = {title for title, _ in found.failures}
    missing += [
        cell.title for cell, _, again in found.repeats if again is None and cell.title not in broken
    ]
    forbidden = [f"{NOISE}: {c.words}" for c in checks if c.passed is False]
    for what, several in (("not measured", missing), ("broken", found.failures)):
        if several:
            forbidden.append(f"{len(several)} of {len(cells)} cells are {what}")
    return Analysis(
        name=grid.name,
        description=grid.description,
        columns=tuple(scale.column for scale in scales),
        entries=tuple(entry_of(board, arm) for arm in found.arms),
        comparisons=tuple(comparisons(board)),
        rankings=tuple(rankings(board)),
        shares=tuple(shares(board)),
        heats=tuple(heats(board)),
        controls=checks,
        conditions=_conditions(board, first),
        no_ranking=tuple(forbidden),
        notes=tuple(_notes(board)),
        failures=tuple(found.failures),
        missing=tuple(missing),
        agreements=tuple(agreements(board)),
    )


def _conditions(board: Board, first: Record) -> dict[str, Any]:
    found = {"lm_eval": first.conditions.get("lm_eval"), **first.conditions.get("settings", {})}
    found |= {f"metric of {s.column.task}": s.column.metric for s in board.scales}
    shots = {task: result.n_shot for task, result in first.tasks.items()}
    found |= {f"shots of {task}": shots[task] for task in shots}
    for arm in board.arms:
        if arm.role == DENSE:
            record = next(iter(arm.records.values()))
            for name in ("model", "tokenizer"):
                found[f"{name} {arm.model}"] = str(record.conditions.get(name))[:16]
    return found | {name: ", ".join(_versions(board, name)) for name in VERSIONED}


def _versions(board: Board, package: str) -> list[str]:
    return sorted({str(r.costs.get("versions", {}).get(package)) for r in board.records()})


def _notes(board: Board) -> Iterable[str]:
    units = {s.column.unit for s in board.scales}
    yield (
        "Intervals hold 95 % over draws and items, widened for few draws; sd is the standard "
        "deviation over draws. p values are adjusted by Holm within a model, level, column and "
        "kind of partner, and verdicts follow them."
    )
    if PERPLEXITY in units:
        yield (
            "Differences of perplexities are differences of their logarithms times 100, nearly "
            "percent; means over draws and tasks are geometric."
        )
    checked = {(arm.model, arm.level) for arm in board.arms if arm.role == DATA_FREE}
    for model, level in board.tables if board.grid.controls.data_free else ():
        if (model, level) not in checked:
            yield f"{model}, {level}: no method without data goes with this level as a control."
    for arm in board.arms:
        if arm.same:
            again = ", ".join(map(str, arm.same))
            yield f"{arm.id}: another draw gives the same set, so draw {again} does not count."
    for scale in board.scales:
        if scale.column.items is None:
            yield (
                f"{scale.column.task}: the harness adds items up in a way of its own, so "
                "intervals are over draws only."
            )
    floor = [s for s in board.scales if s.column.unit == POINTS and s.column.task != AVERAGE]
    for arm in board.arms:
        if arm.role != DENSE:
            continue
        for scale in floor:
            score = float(board.each(arm, scale).mean())
            if score <= (scale.column.chance or 0.0):
                yield (
                    f"{arm.model} is not better than guessing in {scale.column.task}: it "
                    "counts for no retention."
                )
    for name in VERSIONED:
        seen = _versions(board, name)
        if len(seen) > 1:
            yield f"Records were made with several versions of {name}: {', '.join(seen)}."
