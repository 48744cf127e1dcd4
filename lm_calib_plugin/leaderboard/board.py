"""The records of a grid as rows and columns of numbers, for whoever computes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lm_calib_plugin import comparison as stats
from lm_calib_plugin.leaderboard.collect import Arm, Collected
from lm_calib_plugin.leaderboard.grid import Grid
from lm_calib_plugin.leaderboard.records import Record
from lm_calib_plugin.leaderboard.scale import Scale, Values, values_of
from lm_calib_plugin.leaderboard.tables import AVERAGES, COMPRESSED, DATA_FREE, DENSE

Draws = tuple[int, ...]


class Board:
    """Rows that have records, columns, and the scores in them.

    ``tables`` are pairs of model and level: nothing is ever compared across them.
    """

    def __init__(self, grid: Grid, found: Collected, scales: list[Scale]) -> None:
        self.grid, self.found, self.scales = grid, found, scales
        self.arms = [arm for arm in found.arms if arm.records]
        self.values: dict[tuple[str, str], Values] = {
            (arm.id, scale.column.task): values_of(arm, scale, scales)
            for arm in self.arms
            for scale in scales
        }
        self.tables = list(
            dict.fromkeys((arm.model, arm.level) for arm in self.arms if arm.role != DENSE)
        )
        self._resamplings: dict[tuple[str, int, int], stats.Resampling] = {}
        self._resampled: dict[tuple[str, int, str, Draws], Any] = {}

    def rows(self, model: str, level: str) -> list[Arm]:
        """Return the rows of one table."""
        return [a for a in self.arms if (a.model, a.level) == (model, level)]

    def each(self, arm: Arm, scale: Scale) -> Any:
        """Return the score of every draw of a row, as it is worked with."""
        values = self.values[arm.id, scale.column.task]
        return stats.item_scores(values.table, values.weights)

    def resampling(self, arm: Arm, scale: Scale, count: int) -> stats.Resampling:
        """Return the resamples of a column for a number of draws; all rows have equal items."""
        values = self.values[arm.id, scale.column.task]
        items = values.table.shape[1] if values.table.ndim == 2 else 1
        place = (scale.column.task, count, items)
        if place not in self._resamplings:
            self._resamplings[place] = stats.Resampling(count, items, **values.items)
        return self._resamplings[place]

    def resampled(self, arm: Arm, scale: Scale, draws: Draws, count: int) -> Any:
        """Return the scores of draws of a row over resampled items, ``[resamples, draws]``.

        Parameters
        ----------
        draws
            Of the row; one may stand for all.
        count
            How many draws are resampled.
        """
        task = scale.column.task
        if (task, count, arm.id, draws) not in self._resampled:
            # Most of the work is that of the items, so it is done for many rows at a time.
            wanted = {(arm.id, draws): None}
            for other in self.arms:
                labels = self.values[other.id, task].labels
                if len(labels) == count:
                    wanted[other.id, labels] = None
                if other.role in (DENSE, DATA_FREE):
                    wanted[other.id, labels[:1]] = None
            keys = [key for key in wanted if (task, count, *key) not in self._resampled]
            tables = [self.values[id, task].of(labels) for id, labels in keys]
            tables = [t if t.ndim == 2 else t[:, None] for t in tables]
            found = self.resampling(arm, scale, count).scores(tables)
            for key, scores in zip(keys, found, strict=True):
                self._resampled[(task, count, *key)] = scores
        return self._resampled[task, count, arm.id, draws]

    def means(self, arm: Arm, unit: str) -> dict[str, float]:
        """Return the mean scores of a row in the tasks of a unit."""
        found = {}
        for scale in self.scales:
            if scale.column.unit == unit and scale.column.task not in AVERAGES:
                found[scale.column.task] = float(self.each(arm, scale).mean())
        return found

    def chance(self) -> dict[str, float]:
        """Return what guessing scores, by task."""
        return {s.column.task: s.column.chance for s in self.scales if s.column.chance is not None}

    def dense(self, arm: Arm) -> Arm | None:
        """Return the dense row of the same model, if it was measured."""
        return next((a for a in self.arms if a.role == DENSE and a.model == arm.model), None)

    def headline(self) -> list[Scale]:
        """Return the columns that sum up the others; all, where none does."""
        found = [s for s in self.scales if s.column.task in AVERAGES]
        return found or self.scales

    def groups(self, of: Callable[[Arm], str]) -> Iterable[tuple[str, str, str, list[Arm]]]:
        """Yield model, level, what is fixed, and the rows that use data (not nonsense)."""
        for model, level in self.tables:
            arms = [
                a
                for a in self.arms
                if (a.model, a.level) == (model, level) and a.role == COMPRESSED
            ]
            for name in dict.fromkeys(of(a) for a in arms):
                yield model, level, name, [a for a in arms if of(a) == name]

    def records(self) -> Iterable[Record]:
        """Yield all records."""
        return (record for arm in self.arms for record in arm.records.values())
