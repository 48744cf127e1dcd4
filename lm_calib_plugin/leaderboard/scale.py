"""Columns of a leaderboard: which metric of a task counts, in which unit, and its items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_calib_plugin.comparison import POINTS as IN_POINTS
from lm_calib_plugin.comparison import Units
from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.leaderboard.collect import Arm
from lm_calib_plugin.leaderboard.records import (
    EXPONENTIAL,
    NAME_LENGTH,
    Metric,
    Record,
    TaskResult,
)
from lm_calib_plugin.leaderboard.scores import gives
from lm_calib_plugin.leaderboard.tables import (
    AVERAGE,
    AVERAGE_PERPLEXITY,
    AVERAGES,
    PERPLEXITY,
    POINTS,
    Column,
)

# Differences of perplexities are 100 times the difference of their logarithms: nearly percent.
IN_PERCENT = Units("% of perplexity", 100.0, 1)
PREFERRED = ("acc", "exact_match", "word_perplexity", "perplexity")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Values:
    """Scores of one row in one column: ``[draws, items]``, or ``[draws]`` without items.

    They are shares for points, nats for perplexities, else the metric itself; ``weights`` is
    ``[items]``. ``labels`` are the draws. ``strata`` is the task of each item, ``[items]``, in
    columns over several tasks, which are fixed blocks: other items would come from the same tasks.
    """

    table: Array
    weights: Array | None
    labels: tuple[int, ...]
    strata: NDArray[np.int64] | None = None

    @property
    def items(self) -> dict[str, Any]:
        """Weights and strata, as the functions of ``comparison`` take them."""
        return {"weights": self.weights, "strata": self.strata}

    def of(self, draws: Sequence[int]) -> Array:
        """Return the rows of some draws."""
        return self.table[[self.labels.index(draw) for draw in draws]]


@dataclass(frozen=True)
class Scale:
    """A column, and how its numbers are worked with and shown.

    ``reference`` is the metric of the first record (that of the dense row, where there is one): all
    records make their scores of items as it does. None for averages.
    """

    column: Column
    exponential: bool
    units: Units
    reference: Metric | None = None

    def shown(self, value: float) -> float:
        """Return a score as it is printed."""
        return math.exp(value) if self.exponential else value * self._factor

    def possible(self, value: float) -> float:
        """Return the end of an interval that was widened; no share is beyond 0 and 1."""
        return min(1.0, max(0.0, value)) if self.column.unit == POINTS else value

    def shown_error(self, error: float, mean: float) -> float:
        """Return a standard error in the unit of the printed score ``mean``."""
        return error * mean if self.exponential else error * self._factor

    @property
    def _factor(self) -> float:
        return self.units.scale if self.column.unit == POINTS else 1.0


def scales_of(
    tasks: Sequence[str],
    results: Mapping[str, TaskResult],
    metrics: Mapping[str, str],
    chance: Mapping[str, float],
) -> list[Scale]:
    """Return a column for each task, and for the averages of those that have one unit.

    Parameters
    ----------
    results
        Those of any one record.
    metrics, chance
        By task, what the grid says.

    Raises
    ------
    UserError
        For a metric that a task does not have.
    """
    found = [_scale(task, results[task], metrics.get(task), chance.get(task)) for task in tasks]
    for unit, name in ((POINTS, AVERAGE), (PERPLEXITY, AVERAGE_PERPLEXITY)):
        parts = [s for s in found if s.column.unit == unit and s.column.items is not None]
        if len(parts) > 1:
            items = sum(s.column.items or 0 for s in parts)
            column = Column(name, f"mean of {len(parts)} tasks", unit, unit == POINTS, items)
            found.append(Scale(column, unit == PERPLEXITY, parts[0].units))
    return found


def _scale(task: str, result: TaskResult, asked: str | None, chance: float | None) -> Scale:
    name = asked or next((m for m in PREFERRED if m in result.metrics), None)
    name = name or next(iter(sorted(result.metrics)), None)
    if name not in result.metrics:
        known = sorted(result.metrics)
        raise UserError(
            f"metrics.{task}", f"got {name!r}", nearest(str(name), known), f"it has {listed(known)}"
        )
    metric = result.metrics[name]
    share = _is_share(metric)
    unit, units = name, Units(name, 1.0, 3)
    if metric.form == EXPONENTIAL and metric.items is not None:
        unit, units = PERPLEXITY, IN_PERCENT
    elif share:
        unit, units = POINTS, IN_POINTS
    guess = chance if chance is not None else result.chance
    column = Column(
        task,
        name,
        unit,
        metric.higher_is_better and unit != PERPLEXITY,
        None if metric.items is None else len(metric.items),
        # Only what guessing scores in this metric.
        (guess if share and (chance is not None or name.startswith("acc")) else None),
    )
    return Scale(column, unit == PERPLEXITY, units, metric)


def _is_share(metric: Metric) -> bool:
    if metric.form == EXPONENTIAL or not metric.higher_is_better or not 0 <= metric.value <= 1:
        return False
    return metric.items is None or all(0 <= x <= 1 for x in metric.items)


def values_of(arm: Arm, scale: Scale, scales: Sequence[Scale]) -> Values:
    """Return the scores of a row in a column.

    Raises
    ------
    UserError
        For a record whose items do not make its score as those of the reference do; it is named.
    """
    labels = tuple(sorted(arm.records))
    if scale.column.task in AVERAGES:
        return _averaged(arm, scale, scales, labels)
    records = [arm.records[draw] for draw in labels]
    reference = scale.reference
    if reference is None or reference.items is None:
        values = [_metric(record, scale.column).value for record in records]
        return Values(np.array(values), None, labels)
    weights = reference.weights
    return Values(
        np.array([_items(record, scale.column, reference) for record in records]),
        None if weights is None else np.array(weights, dtype=np.float64),
        labels,
    )


def _averaged(arm: Arm, scale: Scale, scales: Sequence[Scale], labels: tuple[int, ...]) -> Values:
    """Put the items of all tasks side by side; every task weighs the same in sum.

    Tasks are the strata. A group of tasks such as ``mmlu`` counts as one: records do not say which
    of its items belongs to which task, so that in its own column, too, differences between its
    tasks count as noise of the items, and intervals are too long rather than too short.
    """
    parts = [
        values_of(arm, s, scales)
        for s in scales
        if s.column.unit == scale.column.unit
        and s.column.task not in AVERAGES
        and s.column.items is not None
    ]
    weights = []
    for part in parts:
        own = np.ones(part.table.shape[1]) if part.weights is None else part.weights
        weights.append(own / own.sum())
    sizes = [part.table.shape[1] for part in parts]
    return Values(
        np.concatenate([p.table for p in parts], 1),
        np.concatenate(weights),
        labels,
        np.repeat(np.arange(len(parts)), sizes),
    )


def _metric(record: Record, column: Column) -> Metric:
    metrics = record.tasks[column.task].metrics
    if column.metric not in metrics:
        raise _refused(record, column, f"has no {column.metric}")
    return metrics[column.metric]


def _items(record: Record, column: Column, reference: Metric) -> Array:
    """Return the items of a record; how they make the score is what they do in the reference.

    That was found for each record by itself, from numbers: items that are all equal may make their
    score in several ways, and count as made in that of the reference where it gives their score.
    """
    metric = _metric(record, column)
    if metric.items is None:
        raise _refused(record, column, "does not say how its items make the score")
    if len(metric.items) != len(reference.items or ()):
        raise _refused(record, column, f"has {len(metric.items)} items")
    alike = (metric.form, metric.weights) == (reference.form, reference.weights)
    if not alike and not gives(reference.form, metric.items, reference.weights, metric.value):
        raise _refused(record, column, "adds its items up in another way")
    return np.array(metric.items, dtype=np.float64)


def _refused(record: Record, column: Column, what: str) -> UserError:
    items = f"{column.items} items" if column.items is not None else "scores"
    return UserError(
        "records",
        f"{record.key[:NAME_LENGTH]} ({record.cell['title']}) {what} in {column.task}",
        f"{items} of one kind are needed in every record of {column.metric}",
        f"delete {record.key[:NAME_LENGTH]}.json and run the grid again",
    )
