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


class Claims:
    """Locks on cells, that the operating system frees when a process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Hold a cell while it is measured; yields False where another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{key[:NAME_LENGTH]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def begin(self, key: str) -> int:
        """Note that a held cell is begun; return how often it was begun before."""
        path = self._trials(key)
        try:
            before = int(path.read_text())
        except (OSError, ValueError):
            before = 0
        write_text(path, str(before + 1))
        return before

    def end(self, key: str) -> None:
        """Forget what was begun: there is a record now."""
        self._trials(key).unlink(missing_ok=True)

    def _trials(self, key: str) -> Path:
        return self.folder / f"{key[:NAME_LENGTH]}.trials"
