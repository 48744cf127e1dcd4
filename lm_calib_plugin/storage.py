"""Files that appear whole or not at all, digests, and the place of the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Return our cache folder: ``$LM_CALIB_CACHE``, else ``$XDG_CACHE_HOME/lm_calib_plugin``."""
    named = os.environ.get("LM_CALIB_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lm_calib_plugin"


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Return the sha256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file."""
    with path.open("rb") as stream:
        total = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise when the disk of ``folder`` has fewer than ``needed`` bytes left."""
    from lm_calib_plugin.errors import UserError

    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            str(folder),
            f"{what} needs {needed / 2**20:.0f} MiB",
            f"{free / 2**20:.0f} MiB are free there",
            "free some space, or name another folder (LM_CALIB_CACHE, report_dir=)",
        )


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a sibling temporary file, then a rename."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, as :func:`write_text` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    require_space(path.parent, len(content) + 4096, path.name)
    temporary = _beside(path)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``path`` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def only_once(path: Path) -> Iterator[None]:
    """Hold an exclusive lock named after ``path``: two processes never make one artifact."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(path.with_name(path.name + ".lock"))):
        yield
