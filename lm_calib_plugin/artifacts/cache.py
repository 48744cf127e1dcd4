"""``cache=true|DIR``: load what an earlier run with the same request made, or make and keep it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lm_calib_plugin import storage
from lm_calib_plugin.artifacts.changes import Dense, NotKeptError
from lm_calib_plugin.artifacts.keeping import keep, most_bytes
from lm_calib_plugin.artifacts.record import DamagedError, NewerError
from lm_calib_plugin.artifacts.request import asked, request_key
from lm_calib_plugin.artifacts.restoring import Loaded, apply, load
from lm_calib_plugin.artifacts.shelf import (
    at_rest,
    check_room,
    check_writable,
    is_empty,
    mark_used,
    shelf_of,
)
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.work import Done, Job

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """A result, and what there is to say of the cache: facts for the report, and warnings."""

    done: Done
    cache: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)


def check_early(job: Job) -> None:
    """Refuse a cache that can not take the model, before any data is read.

    Where something is kept already, it may be what is asked for; then nothing has to be written,
    and the check waits until that is known.

    Raises
    ------
    UserError
        When the folder can not be written, or its disk has too little space.
    """
    shelf = shelf_of(job.runtime.cache)
    if shelf is not None and is_empty(shelf):
        check_writable(shelf)
        check_room(shelf, most_bytes(job))


def loaded_or_done(job: Job, work: Callable[[Job], Done]) -> Outcome:
    """Load the result of a job where it is kept; else do the ``work``, and keep what came out.

    Of several processes with one request one does the work; the others wait for it and load. Only
    this process is needed in here: nothing waits for the other ranks.

    Raises
    ------
    UserError
        When the result can not be kept, before the work begins.
    """
    shelf = shelf_of(job.runtime.cache)
    if shelf is None:
        return Outcome(work(job))
    content = asked(job)
    key = request_key(content)
    place, warnings = shelf / key, list[str]()
    with _lock(place):
        loaded, replaceable = _loaded(place, job, warnings)
        if loaded is not None:
            done = apply(place, loaded, job)
            mark_used(place)
            saved = loaded.record["seconds"]
            facts = {"hit": True, "artifact": str(place), "seconds_saved": saved}
            return Outcome(done, facts, warnings)
        check_writable(shelf)
        check_room(shelf, most_bytes(job))
        dense = Dense.of(job.model, job.blocks, job.hashes)
        done = work(job)
        facts = {"hit": False, "artifact": None}
        if replaceable:
            facts |= _kept(place, job, dense, done, key, content, warnings)
    return Outcome(done, facts, warnings)


@contextlib.contextmanager
def _lock(place: Path) -> Iterator[None]:
    """Hold the lock of an artifact; one in a folder that can only be read is used without."""
    try:
        check_writable(place.parent)
    except UserError:
        if not place.exists():
            raise
        yield
        return
    with at_rest(place) as free:
        if free:
            yield
            return
    log.warning("another process makes %s, or loads it; waiting", place)
    with storage.only_once(place):
        yield


def _loaded(place: Path, job: Job, warnings: list[str]) -> tuple[Loaded | None, bool]:
    """Return the artifact, if there is one that can be trusted, and whether it may be replaced."""
    if not place.exists() and not place.is_symlink():
        return None, True
    replaceable = True
    try:
        return load(place, job), True
    except DamagedError as error:
        warnings.append(f"cache: {error} It was made again.")
    except NewerError as error:
        warnings.append(f"cache: {error} It was left alone, and the model compressed again.")
        replaceable = False
    log.warning(warnings[-1])
    return None, replaceable


def _kept(
    place: Path,
    job: Job,
    dense: Dense,
    done: Done,
    key: str,
    content: dict[str, Any],
    warnings: list[str],
) -> dict[str, Any]:
    """Keep a result; the work is not lost when that fails."""
    try:
        size = keep(place, job, dense, done, key, content)
    except NotKeptError as error:
        warnings.append(f"cache: not kept, because {error}")
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        warnings.append(f"cache: not kept, because it could not be written ({error})")
    else:
        return {"artifact": str(place), "bytes": size}
    log.warning(warnings[-1])
    return {}
