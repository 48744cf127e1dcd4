"""The results of a harness run as a table and as what the hub reads of a card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.export.card_text import cell, plain, table


@dataclass(frozen=True)
class Score:
    """One number of a results file: task, metric, filter, value, standard error, shots."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    shots: int | None

    @property
    def name(self) -> str:
        """Metric, with its filter if it has one."""
        return self.metric if self.filter in ("", "none") else f"{self.metric} ({self.filter})"


def scores(results: Mapping[str, Any]) -> list[Score]:
    """Return every number of a results file of lm_eval, or of its ``results`` alone.

    Raises
    ------
    UserError
        When it is neither.
    """
    inside = results.get("results", results) if isinstance(results, Mapping) else None
    rows = inside.values() if isinstance(inside, Mapping) else [None]
    if not all(isinstance(row, Mapping) for row in rows):
        raise UserError(
            "results",
            "got something else than task -> metric -> value",
            "a results file of lm_eval, or its `results`",
            "the JSON file that `lm_eval --output_path DIR` writes",
        )
    shots = results.get("n-shot")
    found = []
    for task, row in (inside or {}).items():
        for key, value in row.items():
            metric, _, kind = str(key).partition(",")
            if _number(value) is None or metric.endswith("_stderr") or not kind:
                continue
            own = shots.get(task) if isinstance(shots, Mapping) else None
            found.append(
                Score(
                    str(task),
                    metric,
                    kind,
                    float(value),
                    _number(row.get(f"{metric}_stderr,{kind}")),
                    own if type(own) is int else None,
                )
            )
    return found


def results_table(found: list[Score], dense: list[Score]) -> str:
    """Return the table; with scores of the dense model, theirs stand beside."""
    before = {(s.task, s.metric, s.filter): s for s in dense}
    head = ["Task", "Shots", "Metric", "Value", "Standard error"]
    rows = []
    for score in found:
        row = [
            cell(score.task),
            "" if score.shots is None else str(score.shots),
            plain(score.name),
            _shown(score.value),
            _stderr(score),
        ]
        if dense:
            other = before.get((score.task, score.metric, score.filter))
            row += ["", ""] if other is None else [_shown(other.value), _stderr(other)]
        rows.append(row)
    return table(head + (["Dense", "Standard error"] if dense else []), rows)


def model_index(name: str, found: list[Score]) -> list[dict[str, Any]]:
    """Return ``model-index`` of the front matter, one entry a task; infinite values left out."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for score in found:
        if math.isfinite(score.value):
            metric = {"type": score.metric, "name": score.name, "value": score.value}
            tasks.setdefault(score.task, []).append(metric)
    rows = [
        {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": {"type": task, "name": task},
            "metrics": metrics,
        }
        for task, metrics in tasks.items()
    ]
    return [{"name": name, "results": rows}] if rows else []


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def _stderr(score: Score) -> str:
    # The harness writes NaN where one item gives no error.
    return "" if score.stderr is None or math.isnan(score.stderr) else _shown(score.stderr)


def _shown(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.4g}"
