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
    """A progress bar over cells, with the time that is left."""

    def __init__(self, cells: Sequence[Cell], folder: Path, quiet: bool = False) -> None:
        self.cells, self.records = list(cells), Records(folder)
        done = len(cells) - len(waiting(cells, self.records))
        self.bar = tqdm(total=len(cells), initial=done, desc="cells", unit="cell", disable=quiet)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()

    def done(self, cell: Cell, record: Record) -> None:
        """Count a cell, and say so when it failed."""
        if record.status == FAILED:
            self.bar.write(f"failed: {cell.title}: {record.error}", file=sys.stderr)
        self.bar.set_postfix_str(cell.title)
        self.bar.update()
