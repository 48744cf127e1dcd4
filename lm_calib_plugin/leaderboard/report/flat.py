"""An Analysis as tables for programs: CSV, JSON, and the files that leaderboards on a hub read."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lm_calib_plugin.leaderboard.report import wording
from lm_calib_plugin.leaderboard.report.arrange import Row, groups
from lm_calib_plugin.leaderboard.tables import (
    AVERAGES,
    POINTS,
    Analysis,
    Column,
    Comparison,
    Entry,
)

FORMAT = 1
_PARTS = ("sd", "draws", "min", "max", "item_error", "low", "high")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def leaderboard_csv(analysis: Analysis) -> str:
    """Return one line an entry, in the order of the tables; numbers in full."""
    head = [
        *("id", "model", "level", "method", "calibration", "role", "best_rank", "worst_rank"),
        *("draws", "strength_name", "strength", "sparsity", "bits", "calibration_tokens"),
        *("worst_task", "worst_retention", "geometric_mean_retention", "mean_retention"),
        *("recovery", "leaked", *(name for c in analysis.columns for name in _names(c))),
        *("calib_ids", "keys", "failed", "missing", "warnings", "commands"),
    ]
    return _csv(head, (_line(analysis, row) for row in rows(analysis)))


def comparisons_csv(analysis: Analysis) -> str:
    """Return one line a comparison."""
    names = [field.name for field in dataclasses.fields(Comparison)]
    return _csv(names, ([getattr(p, name) for name in names] for p in analysis.comparisons))


def leaderboard_json(analysis: Analysis) -> str:
    """Return everything, with ranks, least and largest draws; numbers that are none are texts."""
    content: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(analysis)}
    ranks = {row.entry.id: row.ranks for row in rows(analysis)}
    for entry in content["entries"]:
        entry["ranks"] = ranks.get(entry["id"])
        for score in entry["scores"].values():
            score["min"] = min(score["draws"], default=None)
            score["max"] = max(score["draws"], default=None)
    return _json(content)


def hub_json(analysis: Analysis) -> dict[str, str]:
    """Return file name -> text in the form of leaderboard back-ends of the hub, one an entry.

    Scores are means over draws; those in points are shares, 0 to 1.
    """
    metrics = {c.task: c for c in analysis.columns if c.task not in AVERAGES}
    found = {}
    for entry in analysis.entries:
        parts = (entry.model, entry.level, entry.method, entry.calibration)
        content = {
            "config": {
                "model_dtype": entry.dtype,
                "model_name": " ".join(part for part in parts if part),
                "model_sha": entry.revision,
            },
            "results": {
                task: {column.metric: _share(entry, column)}
                for task, column in metrics.items()
                if task in entry.scores
            },
        }
        found[f"{file_name(entry.id)}.json"] = _json(content)
    return found


def rows(analysis: Analysis) -> list[Row]:
    """Return every entry once, in the order of the tables."""
    found = {row.entry.id: row for group in groups(analysis) for row in group.rows}
    return list(found.values())


def file_name(*parts: str) -> str:
    """Return a name for a file: readable, plain, and another one for other parts."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)).strip("-.")[:60]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    return f"{slug}-{digest}" if slug else digest


def text(value: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    written = value.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
    return "'" + written if written.startswith(_FORMULA) else written


def _names(column: Column) -> list[str]:
    task = column.task if column.task in AVERAGES else f"{column.task} {column.metric}"
    return [f"{task} {part}" for part in (f"[{column.unit}]", *_PARTS)]


def _line(analysis: Analysis, row: Row) -> list[Any]:
    entry, kept = row.entry, row.entry.kept
    low, high = row.ranks or (None, None)
    line: list[Any] = [
        *(entry.id, entry.model, entry.level, entry.method, entry.calibration, entry.role),
        *(low, high, entry.draws, entry.strength_name, entry.strength, entry.sparsity),
        *(entry.bits, entry.calibration_tokens),
    ]
    names = ("worst_task", "worst", "geometric_mean", "mean", "recovery")
    line += [getattr(kept, name) if kept else None for name in names]
    line.append(entry.leaked)
    for column in analysis.columns:
        score = entry.scores.get(column.task)
        if score is None:
            line += [None] * (1 + len(_PARTS))
            continue
        line += [score.mean, score.sd, len(score.draws), *wording.extremes(score)]
        line += [score.item_error, score.low, score.high]
    lists = ("calib_ids", "keys", "failed", "missing", "warnings", "commands")
    return line + [getattr(entry, name) for name in lists]


def _csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([text(name) for name in head])
    writer.writerows([_cell(value) for value in line] for line in lines)
    return stream.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (tuple, list)):
        separator = " " if all(isinstance(part, int) for part in value) else "\n"
        return text(separator.join(map(str, value)))
    return repr(value) if isinstance(value, (int, float)) else text(str(value))


def _share(entry: Entry, column: Column) -> float:
    mean = entry.scores[column.task].mean
    return mean / 100 if column.unit == POINTS else mean


def _json(content: Any) -> str:
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value
