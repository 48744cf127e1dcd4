"""Runs cells in this process: those without a record, and that no other process works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.claims import TRIALS, Claims
from lm_calib_plugin.leaderboard.records import FAILED, Record, Records


def shard_of(cells: Sequence[Cell], text: str | None) -> list[Cell]:
    """Return the cells of shard ``i/n``, 1 <= i <= n; all of them for None.

    Neighbors stay together: they share a model and a calibration set.

    Raises
    ------
    UserError
        When the text is no such pair.
    """
    if text is None:
        return list(cells)
    first, slash, last = text.partition("/")
    if not (slash and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(
            "shard", f"got {text!r}", "i/n with 1 <= i <= n", "for instance --shard 1/4"
        )
    number, count = int(first), int(last)
    start, end = (len(cells) * n // count for n in (number - 1, number))
    return list(cells[start:end])


def waiting(cells: Sequence[Cell], records: Records, retry_failed: bool = False) -> list[Cell]:
    """Return the cells that have no record; failed ones are among them when they are retried."""
    found = []
    for cell in cells:
        record = records.read(cell.key)
        if record is None or (retry_failed and record.status == FAILED):
            found.append(cell)
    return found


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    measure: Callable[[Cell], Record],
    *,
    retry_failed: bool = False,
    done: Callable[[Cell, Record], Any] = lambda cell, record: None,
) -> int:
    """Measure cells one after another; return how many were measured here.

    Every record is written as soon as it is there. A cell during which the process died several
    times gets a record that says so.
    """
    from lm_calib_plugin.leaderboard.run import died

    records, claims, count = Records(folder), Claims(folder), 0
    for cell in waiting(cells, records, retry_failed):
        with claims.claim(cell.key) as mine:
            # Another process may have been here since the list was made.
            if not mine or not waiting([cell], records, retry_failed):
                continue
            before = claims.begin(cell.key)
            record = died(cell, before) if before >= TRIALS else measure(cell)
            records.write(record)
            claims.end(cell.key)
            count += 1
            done(cell, record)
    return count
