"""Who measures what: any number of processes on one folder, no cell twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lm_calib_plugin.leaderboard.records import NAME_LENGTH
from lm_calib_plugin.storage import write_text

FOLDER = "claims"
# How often a process may end in the middle of a cell before that is taken for its fault.
TRIALS = 3
# Seconds to wait for a lock: whoever only looks whether it is held has it for a moment, too.
PATIENCE = 0.2


class Claims:
    """Locks on cells, that the operating system frees when a process ends, however it ends.

    Parameters
    ----------
    folder
        That of the leaderboard; locks are in ``claims`` below it, beside how often a cell without
        a record was begun.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Hold a cell while it is measured; yields False where another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock(key), timeout=PATIENCE, poll_interval=PATIENCE / 5)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def is_held(self, key: str) -> bool:
        """Tell whether a process measures this cell now; nothing is written."""
        if not (self._trials(key).is_file() and self._lock(key).is_file()):
            return False
        try:
            with FileLock(self._lock(key), blocking=False):
                return False
        except Timeout:
            return True

    def begun(self, key: str) -> int:
        """Return how often a cell without a record was begun."""
        try:
            return int(self._trials(key).read_text())
        except (OSError, ValueError):
            return 0

    def begin(self, key: str, before: int) -> None:
        """Note that a held cell is begun, which it was ``before`` times."""
        write_text(self._trials(key), str(before + 1))

    def undo(self, key: str, before: int) -> None:
        """Take a ``begin`` back: the process was stopped, and the cell is not to blame."""
        if before:
            write_text(self._trials(key), str(before))
        else:
            self.end(key)

    def end(self, key: str) -> None:
        """Forget what was begun: there is a record now."""
        self._trials(key).unlink(missing_ok=True)

    def _trials(self, key: str) -> Path:
        return self.folder / f"{key[:NAME_LENGTH]}.trials"

    def _lock(self, key: str) -> Path:
        return self.folder / f"{key[:NAME_LENGTH]}.lock"
