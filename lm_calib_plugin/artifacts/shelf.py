"""The folder of kept artifacts: what is there, what is in use, and what goes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_calib_plugin import storage
from lm_calib_plugin.artifacts.record import (
    RECORD,
    DamagedError,
    NewerError,
    check_tensors,
    read_record,
)
from lm_calib_plugin.errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

ARGUMENT = "cache"
_KEY = re.compile(r"[0-9a-f]{64}")
_PART_OF_A_KEY = re.compile(r"[0-9a-f]{4,64}")


def shelf_of(cache: bool | str) -> Path | None:
    """Return the folder that an argument ``cache`` means; None where nothing is kept."""
    if cache is True:
        return storage.cache_dir() / "artifacts"
    return Path(cache) if cache else None


@dataclass(frozen=True)
class Entry:
    """One artifact.

    ``record`` is None where it can not be read, ``problem`` says why. ``used`` is when it was last
    stored or loaded, in seconds since 1970.
    """

    key: str
    folder: Path
    record: dict[str, Any] | None
    problem: str
    bytes: int
    used: float


def entries(shelf: Path) -> list[Entry]:
    """Return all artifacts of a folder, last used first; their tensors are not read."""
    try:
        places = [path for path in shelf.iterdir() if _KEY.fullmatch(path.name)]
    except OSError:
        return []
    found = [entry for entry in map(_entry, places) if entry is not None]
    return sorted(found, key=lambda entry: (-entry.used, entry.key))


def is_empty(shelf: Path) -> bool:
    """Tell whether a folder holds no artifact, whole or damaged."""
    try:
        return not any(_KEY.fullmatch(path.name) for path in shelf.iterdir())
    except OSError:
        return True


def _entry(place: Path) -> Entry | None:
    record, problem = None, ""
    try:
        record = read_record(place)
    except (DamagedError, NewerError) as error:
        problem = str(error)
    try:
        files = [] if place.is_symlink() or not place.is_dir() else list(place.iterdir())
        size = sum(file.lstat().st_size for file in files)
        dated = place / RECORD if (place / RECORD) in files else place
        used = dated.lstat().st_mtime
    except OSError:
        return None  # it went while we looked
    return Entry(place.name, place, record, problem, size, used)


def chosen(shelf: Path, keys: Sequence[str]) -> list[Entry]:
    """Return the artifacts that keys, or beginnings of keys, name.

    Raises
    ------
    UserError
        For a text that is no key, or names none or several; nothing outside the folder is ever
        looked at.
    """
    there = entries(shelf)
    found: dict[str, Entry] = {}
    for text in keys:
        if not _PART_OF_A_KEY.fullmatch(text):
            raise UserError(
                "key", f"got {text!r}", "4 to 64 digits 0-9 a-f, as lm-calib cache ls shows them"
            )
        fitting = [entry for entry in there if entry.key.startswith(text)]
        if len(fitting) != 1:
            what = "no artifact" if not fitting else f"{len(fitting)} artifacts"
            fix = "lm-calib cache ls lists all" if not fitting else "give more digits"
            raise UserError("key", f"{what} in {shelf} begins with {text}", fix=fix)
        found[fitting[0].key] = fitting[0]
    return list(found.values())


@contextlib.contextmanager
def at_rest(place: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of an artifact; yields False, without it, while another process has it.

    With ``wait`` it is waited for.

    Raises
    ------
    UserError
        When the folder can not be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(str(lock_of(place)), blocking=wait)
    try:
        _acquire(lock)
    except Timeout:
        yield False
        return
    except OSError as error:
        raise unusable(place.parent, error) from None
    try:
        yield True
    finally:
        lock.release()


def _acquire(lock: BaseFileLock) -> None:
    """Acquire a lock, the file of which may be deleted by the process that holds it.

    Whoever waited for that file would then hold what nobody else looks at, and begins again.
    """
    file = Path(lock.lock_file)
    while True:
        before = _identity(file)
        lock.acquire()
        now = _identity(file)
        if now is not None and before in (None, now):
            return
        lock.release()


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def lock_of(place: Path) -> Path:
    """Return the lock file of an artifact."""
    return place.with_name(f"{place.name}.lock")


def unkept_of(place: Path) -> Path:
    """Return the file that says when an artifact could not be kept; it is empty."""
    return place.with_name(f".{place.name}.unkept")


def mark_unkept(place: Path) -> None:
    """Tell the processes that wait for an artifact that it could not be kept."""
    with contextlib.suppress(OSError):
        unkept_of(place).touch()
        os.utime(unkept_of(place))


def last_unkept(place: Path) -> int:
    """Return when an artifact could not be kept, in some nanoseconds; 0 for never."""
    try:
        return unkept_of(place).stat().st_mtime_ns
    except OSError:
        return 0


def set_aside(place: Path) -> None:
    """Delete what stands in the place of an artifact; whoever holds the lock may do so.

    It is renamed first: a process that is killed on the way leaves nothing that looks like an
    artifact. A link is deleted, not what it leads to.
    """
    if place.is_symlink() or place.is_file():
        place.unlink()
        return
    with contextlib.suppress(FileNotFoundError):
        aside = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.tmp")
        place.replace(aside)
        shutil.rmtree(aside, ignore_errors=True)


def removed(entry: Entry) -> bool:
    """Delete an artifact and its lock; False, and nothing is done, while a process uses it."""
    with at_rest(entry.folder) as free:
        if free:
            try:
                set_aside(entry.folder)
            except OSError as error:
                raise unusable(entry.folder.parent, error) from None
            _forget(entry.folder)
    return free


def sweep(shelf: Path) -> None:
    """Delete the locks and marks of artifacts that are not there, unless a process uses them."""
    for file in list(shelf.glob("*.lock")) + list(shelf.glob(".*.unkept")):
        place = shelf / file.stem.removeprefix(".")
        if _KEY.fullmatch(place.name) and not os.path.lexists(place):
            with at_rest(place) as free:
                if free and not os.path.lexists(place):
                    _forget(place)


def _forget(place: Path) -> None:
    """Delete the lock and the mark of an artifact; whoever holds the lock may do so."""
    for file in (unkept_of(place), lock_of(place)):
        # Windows deletes no file that is open: the lock stays there until the next sweep.
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def verified(entry: Entry) -> str | None:
    """Return what is wrong with an artifact: every byte is read. None while it is in use."""
    with at_rest(entry.folder) as free:
        if not free:
            return None
        try:
            check_tensors(entry.folder, read_record(entry.folder))
        except (DamagedError, NewerError) as error:
            return str(error)
    return ""


def over_budget(shelf: Path, limit: int) -> list[Entry]:
    """Return the artifacts to delete so that the others take at most ``limit`` bytes.

    The least recently used go first.
    """
    there = entries(shelf)
    total = sum(entry.bytes for entry in there)
    going = []
    for entry in reversed(there):
        if total <= limit:
            break
        going.append(entry)
        total -= entry.bytes
    return going


def mark_used(place: Path) -> None:
    """Note that an artifact is used now; where the folder can not be written, nothing is noted."""
    with contextlib.suppress(OSError):
        now = time.time()
        os.utime(place / RECORD, (now, now))


def check_writable(shelf: Path) -> None:
    """Make the folder, and a file in it that has no name and is gone at once.

    Raises
    ------
    UserError
        When that is not possible.
    """
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=shelf) as file:
            file.write(b"-")
    except OSError as error:
        raise unusable(shelf, error) from None


def check_room(shelf: Path, needed: int) -> None:
    """Raise a UserError when the disk of the folder has fewer than ``needed`` bytes left."""
    free = shutil.disk_usage(next(p for p in (shelf, *shelf.parents) if p.exists())).free
    if free < needed:
        raise UserError(
            ARGUMENT,
            f"{free / 2**20:.0f} MiB are free in {shelf}",
            f"keeping this model may need {needed / 2**20:.0f} MiB",
            "lm-calib cache rm --keep 10GB makes room; cache=DIR names another folder, "
            "cache=false keeps nothing",
        )


def unusable(shelf: Path, error: OSError) -> UserError:
    """Return the error of a folder that can not be written."""
    return UserError(
        ARGUMENT,
        f"{shelf} can not be written ({error.strerror or error})",
        "a folder of your own",
        "cache=DIR names another folder, cache=false keeps nothing",
    )
