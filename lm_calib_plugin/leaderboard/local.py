"""Runs cells in this process: those without a record, and that no other process works on."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.claims import TRIALS, Claims
from lm_calib_plugin.leaderboard.records import FAILED, Record, Records


class Stopped(KeyboardInterrupt):
    """A scheduler, or whoever started this process, wants it to end."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGTERM what Ctrl-C is: the cell at work is given back, and is not held guilty."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    return _part(cells, int(first), int(last))


def order_of(cells: Sequence[Cell], number: int, count: int) -> list[Cell]:
    """Return all cells in the order of worker ``number`` of ``count``: its own part comes first.

    Then it helps others, from the end of their parts: they come from the other side.
    """
    found = _part(cells, number, count)
    for step in range(1, count):
        found += reversed(_part(cells, (number + step - 1) % count + 1, count))
    return found


def _part(cells: Sequence[Cell], number: int, count: int) -> list[Cell]:
    start, end = (len(cells) * n // count for n in (number - 1, number))
    return list(cells[start:end])


def waiting(cells: Sequence[Cell], records: Records) -> list[Cell]:
    """Return the cells that have no record."""
    return [cell for cell in cells if not records.has(cell.key)]


def forget_failed(cells: Sequence[Cell], folder: Path) -> int:
    """Delete the records of failed cells, so that these are run again; return how many."""
    records, claims, count = Records(folder), Claims(folder), 0
    failed = [r.key for r in records.read_all(c.key for c in cells) if r.status == FAILED]
    for key in failed:
        with claims.claim(key) as mine:
            if mine:
                records.path(key).unlink(missing_ok=True)
                claims.end(key)
                count += 1
    return count


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    measure: Callable[[Cell], Record],
    *,
    done: Callable[[Cell, Record], Any] = lambda cell, record: None,
    go_on: Callable[[], bool] = lambda: True,
) -> int:
    """Measure cells one after another; return how many were measured here.

    Every record is written as soon as it is there. A cell during which the process died several
    times gets a record that says so. What others hold is looked at again at the end: they may
    have died.
    """
    records, claims, count = Records(folder), Claims(folder), 0
    left, held = waiting(cells, records), list[Cell]()
    while left:
        for cell in left:
            if not go_on():
                return count
            with claims.claim(cell.key) as mine:
                if not mine:
                    held.append(cell)
                    continue
                # Another process may have been here since the list was made.
                if records.has(cell.key):
                    continue
                record = _measured(cell, records, claims, measure)
            count += 1
            done(cell, record)
        held = waiting(held, records)
        if len(held) == len(left):
            break
        left, held = held, []
    return count


def _measured(
    cell: Cell, records: Records, claims: Claims, measure: Callable[[Cell], Record]
) -> Record:
    before = claims.begun(cell.key)
    # All of it is inside: a signal may come between any two of these lines.
    try:
        claims.begin(cell.key, before)
        record = died(cell, before) if before >= TRIALS else measure(cell)
        records.write(record)
        claims.end(cell.key)
    except BaseException:
        claims.undo(cell.key, 0 if records.has(cell.key) else before)
        raise
    return record


def place_of(cell: Cell) -> dict[str, Any]:
    """Return the place of a cell in its grid, for its record."""
    return cell.names | {
        "role": cell.role,
        "repeat": cell.repeat,
        "title": cell.title,
        "command": cell.command(),
    }


def died(cell: Cell, trials: int) -> Record:
    """Return the record of a cell that nobody came back from."""
    error = f"the process ended {trials} times while this cell was measured"
    error += " (killed, or out of memory?)"
    return Record(cell.key, place_of(cell), cell.identity(), FAILED, error=error)


def cells_text(cells: Sequence[Cell]) -> str:
    """Return cells as JSON, for another process."""
    return json.dumps([asdict(cell) for cell in cells])


def cells_from(text: str) -> list[Cell]:
    """Return the cells that :func:`cells_text` wrote."""
    return [Cell(**{**one, "tasks": tuple(one["tasks"])}) for one in json.loads(text)]
