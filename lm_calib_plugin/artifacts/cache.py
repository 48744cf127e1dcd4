"""``cache=true|DIR``: load what an earlier run with the same request made, or make and keep it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

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
    last_unkept,
    mark_unkept,
    mark_used,
    shelf_of,
)
from lm_calib_plugin.errors import UserError, listed
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

    Where something is kept already, it may be what is asked for, and then nothing has to be
    written: the run goes on, after a warning.

    Raises
    ------
    UserError
        When the folder is empty, and can not be written or its disk has too little space.
    """
    shelf = shelf_of(job.runtime.cache)
    if shelf is None:
        return
    try:
        _check_shelf(shelf, job)
    except UserError as error:
        if is_empty(shelf):
            raise
        log.warning("%s Unless it is there already, the model will not be kept.", error)


def _check_shelf(shelf: Path, job: Job) -> None:
    check_writable(shelf)
    check_room(shelf, most_bytes(job))


def loaded_or_done(job: Job, work: Callable[[Job], Done]) -> Outcome:
    """Load the result of a job where it is kept; else do the ``work``, and keep what came out.

    Of several processes with one request one does the work; the others wait for it and load. Where
    nothing can be kept, none waits. Processes that divide the work come and go together: all load,
    or all work, and the first one keeps.
    """
    shelf = shelf_of(job.runtime.cache)
    if shelf is None:
        return Outcome(work(job))
    content = asked(job)
    # Processes on other hardware go by the name that the first one gives it.
    key = job.ranks.first("cache key", request_key(content))
    place, warnings = shelf / key, list[str]()
    if job.ranks.several:
        return _loaded_or_done_together(job, work, place, content, warnings)
    with contextlib.ExitStack() as lock:
        problem = lock.enter_context(_lock(place))
        loaded, replaceable = _loaded(place, job, warnings)
        if loaded is not None:
            done = apply(place, loaded, job)
            mark_used(place)
            saved = loaded.record["seconds"]
            facts = {"hit": True, "artifact": str(place), "seconds_saved": saved}
            return Outcome(done, facts, warnings)
        facts = {"hit": False, "artifact": None}
        if replaceable and _can_keep(shelf, job, problem, warnings):
            dense = Dense.of(job.model, job.blocks, job.hashes)
            done = work(job)
            return Outcome(
                done, facts | _kept(place, job, dense, done, key, content, warnings), warnings
            )
    # Nobody has to wait for what will not be kept.
    return Outcome(work(job), facts, warnings)


def _loaded_or_done_together(
    job: Job,
    work: Callable[[Job], Done],
    place: Path,
    content: dict[str, Any],
    warnings: list[str],
) -> Outcome:
    """Do what :func:`loaded_or_done` does; the first process holds the lock for all."""
    ranks = job.ranks
    facts: dict[str, Any] = {"hit": False, "artifact": None}
    with contextlib.ExitStack() as lock:
        problem = lock.enter_context(_lock(place)) if ranks.rank == 0 else ""
        # The others look once nobody writes there.
        ranks.exchange("cache lock")
        loaded, replaceable = _loaded(place, job, warnings)
        there = ranks.exchange("cache", loaded is not None)
        if loaded is not None and all(there):
            done = apply(place, loaded, job)
            if ranks.rank == 0:
                mark_used(place)
            ranks.exchange("loaded")
            saved = loaded.record["seconds"]
            return Outcome(
                done, {"hit": True, "artifact": str(place), "seconds_saved": saved}, warnings
            )
        if any(there):
            alone = [str(number) for number, found in enumerate(there) if not found]
            warnings.append(f"cache: not every process could load the model (not {listed(alone)})")
        if ranks.rank == 0 and replaceable and _can_keep(place.parent, job, problem, warnings):
            dense = Dense.of(job.model, job.blocks, job.hashes)
            done = work(job)
            facts |= _kept(place, job, dense, done, place.name, content, warnings)
        else:
            done = work(job)
        facts, warnings = ranks.first("kept", (facts, warnings))
    return Outcome(done, facts, warnings)


@contextlib.contextmanager
def _lock(place: Path) -> Iterator[str]:
    """Hold the lock of an artifact; yields why nothing can be kept, where that is known.

    Where the folder can only be read, what it holds is used without.
    """
    with contextlib.ExitStack() as held:
        problem = ""
        try:
            check_writable(place.parent)
            if not held.enter_context(at_rest(place)):
                before = last_unkept(place)
                log.warning("another process makes %s, or loads it; waiting", place)
                held.enter_context(at_rest(place, wait=True))
                if last_unkept(place) != before:
                    problem = "cache: another process could not keep the same model just now."
        except UserError as error:
            problem = str(error)
        yield problem


def _can_keep(shelf: Path, job: Job, problem: str, warnings: list[str]) -> bool:
    """Tell whether a result can be kept, as far as that is known before the work."""
    try:
        if not problem:
            _check_shelf(shelf, job)
    except UserError as error:
        problem = str(error)
    if problem:
        warnings.append(f"{problem} The model was compressed, and not kept.")
        log.warning(warnings[-1])
    return not problem


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
    """Keep a result; the work is not lost when that fails, and those who wait are told."""
    try:
        size = keep(place, job, dense, done, key, content)
    except NotKeptError as error:
        warnings.append(f"cache: not kept, because {error}")
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        warnings.append(f"cache: not kept, because it could not be written ({error})")
    else:
        return {"artifact": str(place), "bytes": size}
    mark_unkept(place)
    log.warning(warnings[-1])
    return {}
