"""What is done and how long the rest may take, told from the records so far."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.local import waiting
from lm_calib_plugin.leaderboard.records import DONE, FAILED, Record, Records


def seconds_of(record: Record) -> float:
    """Return the wall time of a cell, in seconds."""
    seconds = record.costs.get("seconds", {})
    return float(sum(v for k, v in seconds.items() if k in ("tasks", "model", "evaluation")))


def expected_seconds(left: Sequence[Cell], measured: Sequence[Record]) -> float | None:
    """Return the expected time of cells in one process; None before any was measured.

    Every cell is taken to need what cells of its model and method needed in the median, else what
    all cells did.
    """
    times: dict[Any, list[float]] = {}
    for record in measured:
        if record.status == DONE:
            own = (record.cell["model"], record.cell["method"])
            for group in (own, None):
                times.setdefault(group, []).append(seconds_of(record))
    if not times:
        return None
    return sum(
        statistics.median(times.get((cell.model, cell.method), times[None])) for cell in left
    )


def estimate(cells: Sequence[Cell], records: Records) -> str:
    """Return one line: how many cells are done, failed and open, and what these may take."""
    found = list(records.read_all(cell.key for cell in cells))
    left = waiting(cells, records)
    broken = sum(record.status == FAILED for record in found)
    text = f"{len(cells)} cells: {len(found) - broken} done, {broken} failed, {len(left)} open"
    seconds = expected_seconds(left, found)
    if left and seconds is None:
        return f"{text}; no estimate before the first cells are done"
    return text + (f"; about {duration(seconds)} in one process" if left and seconds else "")


def duration(seconds: float) -> str:
    """Return a time for people: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Bar:
    """A progress bar over cells: how many are done and failed, and the time that is left.

    Parameters
    ----------
    cells
        All of them.
    folder
        That of the leaderboard; whoever writes records there is counted.
    jobs
        How many processes share the work.
    quiet
        Whether nothing but failures is shown.
    """

    def __init__(
        self, cells: Sequence[Cell], folder: Path, jobs: int = 1, quiet: bool = False
    ) -> None:
        self.records, self.jobs = Records(folder), jobs
        self.left = {cell.key: cell for cell in cells}
        self.found: list[Record] = []
        before = self._new()
        self.bar = tqdm(
            total=len(cells),
            initial=len(before),
            desc="cells",
            disable=quiet,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        self._show()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()

    def look(self) -> int:
        """Count the records that are new, tell of failed ones; return how many are new."""
        new = self._new()
        for record in new:
            if record.status == FAILED:
                self.say(f"failed: {record.cell['title']}: {record.error}")
        if new:
            self.bar.update(len(new))
            self._show()
        elif sys.stderr.isatty():
            self.bar.refresh()
        return len(new)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.write(text, file=sys.stderr)

    def _new(self) -> list[Record]:
        new = list(self.records.read_all(self.left))
        for record in new:
            del self.left[record.key]
        self.found += new
        return new

    def _show(self) -> None:
        failed = sum(record.status == FAILED for record in self.found)
        seconds = expected_seconds(list(self.left.values()), self.found)
        rest = f"{duration(seconds / self.jobs)} left" if seconds else ""
        parts = (f"{failed} failed" if failed else "", rest)
        self.bar.set_postfix_str(", ".join(part for part in parts if part))
