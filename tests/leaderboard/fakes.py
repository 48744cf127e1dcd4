"""Cells that nobody measures, and what they might have given; imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lm_calib_plugin.leaderboard.cells import Cell, cells_of
from lm_calib_plugin.leaderboard.grid import check_grid
from lm_calib_plugin.leaderboard.records import DONE, Metric, Record, TaskResult


def light_cells(draws: int = 3, calibrations: int = 3) -> list[Cell]:
    """Return cells of a grid that nobody can measure: they are for fake ones."""
    content = {
        "models": ["no/model"],
        "methods": ["wanda", "sparsegpt"],
        "levels": ["50%"],
        "calibrations": [f"file:{n}.txt" for n in range(calibrations)],
        "draws": draws,
        "tasks": ["none"],
        "controls": False,
    }
    return cells_of(check_grid(content))


def fake_record(cell: Cell, value: float = 0.5) -> Record:
    """Return what a cell might have given."""
    metric = Metric(value, True, items=[value, value])
    task = TaskResult("1", 0, "h", "d", 2, 0.5, {"acc": metric})
    return Record(
        key=cell.key,
        cell=cell.names | {"role": cell.role, "repeat": cell.repeat, "title": cell.title},
        identity=cell.identity(),
        status=DONE,
        tasks={"none": task},
        costs={"seconds": {"evaluation": 2.0}},
    )


def lasting(record: Record) -> dict[str, Any]:
    """Return everything of a record but what it cost."""
    return {name: value for name, value in asdict(record).items() if name != "costs"}
