"""Records of a made-up grid: scores from a formula, so that every statistic is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_calib_plugin.leaderboard.cells import Cell, cells_of
from lm_calib_plugin.leaderboard.grid import Grid, check_grid
from lm_calib_plugin.leaderboard.records import (
    DONE,
    EXPONENTIAL,
    MEAN,
    Metric,
    Record,
    Records,
    TaskResult,
)
from lm_calib_plugin.leaderboard.run import place_of

ITEMS = 200
RIDDLES = 50
TASKS = ("quiz", "prose", "count")
GRID: dict[str, Any] = {
    "name": "made-up",
    "models": {"tiny": {"pretrained": "folder"}},
    "methods": ["wanda", "sparsegpt"],
    "levels": ["50%"],
    "calibrations": ["c4", "self"],
    "draws": 3,
    "baseline": "c4",
    "tasks": list(TASKS),
    "recipe": {"propagate": "dense"},
}
# What a cell scores in the quiz, without the noise of its draw.
LEVEL = {
    "dense": 0.9, "wanda": 0.6, "sparsegpt": 0.7, "magnitude": 0.5, "dsnot": 0.65, "rtn": 0.5,
    "hqq": 0.55,
}  # fmt: skip
SOURCE = {"self": 0.1, "null:random": -0.1}
# In the riddles (a second quiz, of another size and chance) sources stand the other way round.
RIDDLE = {"c4": 0.8, "self": 0.7, "null:random": 0.5}
# Riddles that a draw of a calibration adds, whichever method takes it: pairs of draws share it.
EFFECT = {("c4", 1): 6, ("c4", 2): -4, ("self", 1): -6, ("self", 2): 8}


def grid(**changes: Any) -> Grid:
    return check_grid({**GRID, **changes})


def result(cell: Cell, tasks: Sequence[str] = TASKS) -> dict[str, TaskResult]:
    """Return what a cell scores: 0/1 items, perplexities of documents, and a number without."""
    share = LEVEL[cell.method] + SOURCE.get(cell.calibration, 0.0)
    shift = {"dense": 0, "data-free": 0}.get(cell.role, cell.draw)
    right = np.zeros(ITEMS)
    right[: round(share * ITEMS) + 2 * shift] = 1
    words = 10.0 + np.arange(20)
    nats = 3.0 - share + 0.01 * shift + 0.001 * np.arange(20)
    quiz = Metric(float(right.mean()), True, MEAN, right.tolist())
    value = float(np.exp(np.average(nats, weights=words)))
    prose = Metric(value, False, EXPONENTIAL, nats.tolist(), words.tolist())

    solved = np.zeros(RIDDLES)
    share_solved = RIDDLE.get(cell.calibration, 0.6) + (cell.method == "sparsegpt") * 0.04
    solved[: round(share_solved * RIDDLES) + EFFECT.get((cell.calibration, cell.draw), 0)] = 1
    riddle = Metric(float(solved.mean()), True, MEAN, solved.tolist())

    def task(name: str, metrics: dict[str, Metric], items: int, chance: float | None) -> TaskResult:
        return TaskResult("1.0", 0, f"hash of {name}", f"items of {name}", items, chance, metrics)

    found = {
        "quiz": task("quiz", {"acc": quiz}, ITEMS, 0.25),
        "prose": task("prose", {"word_perplexity": prose}, 20, None),
        "count": task("count", {"bleu": Metric(40.0 + share + shift, True)}, 30, None),
        "riddles": task("riddles", {"acc": riddle}, RIDDLES, 0.5),
    }
    return {name: found[name] for name in tasks}


def record_of(cell: Cell, **changes: Any) -> Record:
    compression = None
    if cell.recipe is not None:
        drawn = {"calib_id": f"{cell.calibration} {cell.draw}", "tokens": 4096}
        compression = {
            "key": f"{cell.method} {cell.calibration} {cell.draw}",
            "weights_digest": f"{cell.method} {cell.calibration} {cell.draw}",
            "calibration": drawn if cell.role != "data-free" else None,
            "achieved": {"sparsity": 0.5, "bits": None},
            "warnings": [],
            "leakage": {"quiz": {"items": ITEMS, "touched": 2, "share": 0.01}},
        }
        if cell.role == "data-free":
            compression |= {"key": cell.method, "weights_digest": cell.method}
    content: dict[str, Any] = {
        "key": cell.key,
        "cell": place_of(cell),
        "identity": cell.identity(),
        "status": DONE,
        "compression": compression,
        "conditions": {"lm_eval": "0.4.13", "model": "m", "tokenizer": "t", "chat_template": None},
        "tasks": result(cell),
        "costs": {"seconds": {"evaluation": 2.0}, "versions": {"torch": "2.13.0"}},
    }
    return Record(**{**content, **changes})


def fill(folder: Path, made: Grid, lacks: tuple[str, str, int] | None = None) -> list[Cell]:
    """Write a record for every cell, but for one (method, calibration, draw)."""
    cells = cells_of(made)
    tasks = list(dict.fromkeys((*TASKS, *made.tasks)))
    for cell in cells:
        if (cell.method, cell.calibration, cell.draw) != lacks:
            Records(folder).write(record_of(cell, tasks=result(cell, tasks)))
    return cells
