"""What ``lm-calib doctor`` looks at. Each check says what it found and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lm_calib_plugin import __version__, _autoload, builtin_models, storage
from lm_calib_plugin.artifacts.shelf import entries, shelf_of

PACKAGES = ("lm-eval", "transformers", "torch", "datasets", "accelerate", "optimum")
_SECONDS_AT_WORK = 10.0


class State(Enum):
    """How a check came out."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    state: State
    what: str
    detail: str


def examine(*, clean: bool = False, folders: Sequence[Path] = ()) -> Iterator[Finding]:
    """Yield the findings; ``clean`` deletes what interrupted writes left in our cache.

    ``folders`` are places where models were exported to: interrupted writes are looked for there,
    too.
    """
    yield from _versions()
    yield from _bridge()
    yield from _cache(clean)
    for folder in folders:
        # An export that is being loaded back is not written to for a while.
        yield from _leftovers(folder, clean, storage.ABANDONED)
    yield from _artifacts()
    yield from _builtin()
    yield from _devices()


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files and folders that interrupted writes left below a folder."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        hits = [name for name in (*folders, *files) if storage.TEMPORARY.match(name)]
        found += [Path(parent) / name for name in hits]
        folders[:] = [name for name in folders if name not in hits]
    return sorted(found)


def is_in_use(leftover: Path, seconds: float = _SECONDS_AT_WORK) -> bool:
    """Return whether a process may still be writing there: it holds the lock, or just wrote."""
    from filelock import FileLock, Timeout

    match = storage.TEMPORARY.match(leftover.name)
    lock = leftover.with_name(f"{match['target']}.lock") if match else leftover
    if lock.is_file():
        try:
            with FileLock(str(lock), blocking=False):
                return False
        except Timeout:
            return True
    try:
        newest = max(path.lstat().st_mtime for path in (leftover, *leftover.rglob("*")))
    except FileNotFoundError:  # it changes while we look
        return True
    return time.time() - newest < seconds


def _versions() -> Iterator[Finding]:
    yield Finding(State.OK, "lm-calib-plugin", f"{__version__}, Python {platform.python_version()}")
    for name in PACKAGES:
        try:
            yield Finding(State.OK, name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(State.PROBLEM, name, f"not installed; pip install {name}")


def _bridge() -> Iterator[Finding]:
    try:
        finds_plugins, names = _seen_by_lm_eval()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        yield Finding(State.PROBLEM, "bridge", f"lm_eval can not be imported: {error}")
        return
    unseen = [name for name in _autoload.MODELS if name not in names]
    if finds_plugins:
        yield Finding(State.OK, "bridge", "not needed: this lm-eval finds plugins itself")
    elif not unseen:
        yield Finding(State.OK, "bridge", f"active: lm_eval knows {', '.join(_autoload.MODELS)}")
    elif os.environ.get(_autoload.OPT_OUT, "") not in ("", "0"):
        yield Finding(State.NOTE, "bridge", f"off, {_autoload.OPT_OUT} is set; use lm-calib eval")
    else:
        why = "the start-up file did not run (python -S, PYTHONPATH, or a --target install)"
        yield Finding(State.PROBLEM, "bridge", f"{why}; use lm-calib eval, or install with pip")


def _seen_by_lm_eval() -> tuple[bool, list[str]]:
    """Return whether lm-eval finds plugins itself, and the model names that it knows.

    Asked in a new process: in this one our package is imported, which makes the names known.
    """
    code = (
        "import lm_eval.models; from lm_eval.api import registry; "
        "print(hasattr(registry, 'load_plugins'), *registry.model_registry.keys())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)  # noqa: S603
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    finds_plugins, *names = done.stdout.split()
    return finds_plugins == "True", names


def _cache(clean: bool) -> Iterator[Finding]:
    folder = storage.cache_dir()
    if not folder.is_dir():
        yield Finding(State.OK, "cache", f"{folder} (made on first use)")
        return
    free = shutil.disk_usage(folder).free / 2**30
    if os.access(folder, os.W_OK):
        yield Finding(State.OK, "cache", f"{folder}, {free:.1f} GiB free")
    else:
        yield Finding(State.PROBLEM, "cache", f"{folder} can not be written; set LM_CALIB_CACHE")
    yield from _leftovers(folder, clean, _SECONDS_AT_WORK)


def _leftovers(folder: Path, clean: bool, seconds: float) -> Iterator[Finding]:
    for path in leftovers(folder):
        if is_in_use(path, seconds):
            yield Finding(State.NOTE, "leftover", f"{path} is being written")
        elif clean:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            yield Finding(State.OK, "leftover", f"{path} deleted")
        else:
            detail = f"{path} of an interrupted write; harmless, --clean deletes it"
            yield Finding(State.NOTE, "leftover", detail)


def _artifacts() -> Iterator[Finding]:
    shelf = shelf_of(True)
    found = entries(shelf) if shelf is not None else []
    if not found:
        return
    size = sum(entry.bytes for entry in found) / 2**30
    detail = f"{len(found)} in {shelf}, {size:.2f} GiB; lm-calib cache ls, rm, verify"
    yield Finding(State.OK, "compressed models", detail)
    for entry in found:
        if entry.problem:
            detail = f"{entry.problem} lm-calib cache rm {entry.key[:12]} deletes it"
            yield Finding(State.NOTE, "compressed models", detail)


def _builtin() -> Iterator[Finding]:
    for name in builtin_models.names():
        what, folder = f"{builtin_models.PREFIX}{name}", builtin_models.folder_of(name)
        missing = builtin_models.missing(name)
        if folder.exists():
            whole = builtin_models.is_whole(folder, thorough=True)
            detail = f"{folder}, every file whole" if whole else f"{folder} is damaged; delete it"
            yield Finding(State.OK if whole else State.PROBLEM, what, detail)
        elif missing:
            yield Finding(State.NOTE, what, f"not installed; {missing}")
        else:
            yield Finding(State.OK, what, "installed; converted on first use")


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding(State.PROBLEM, "devices", f"torch can not be imported: {error}")
        return
    if not torch.cuda.is_available():
        yield Finding(State.NOTE, "devices", "no CUDA device; models run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        yield Finding(
            State.OK, f"cuda:{index}", f"{facts.name}, {memory}, CUDA {torch.version.cuda}"
        )
