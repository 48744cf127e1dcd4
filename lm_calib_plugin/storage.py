"""Files that appear whole or not at all, digests, and the place of the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Seconds without a change after which a temporary folder belongs to no living process.
ABANDONED = 3600.0
# Names of temporary files and folders, and of folders that make way for a new one.
OLD = ".old"
TEMPORARY = re.compile(r"^\.(?P<target>.+)\.[0-9a-f]{8}\.tmp$")
REPLACED = re.compile(r"^\.(?P<target>.+)\.[0-9a-f]{8}\.old$")


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


def version_of(package: str) -> str | None:
    """Return the version of an installed package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def own_version() -> str:
    """Return the version of this package, for records."""
    return version_of("lm-calib-plugin") or "not installed"


def record_text(content: dict[str, Any]) -> str:
    """Return the one text of a record that is signed with its own digest.

    It is readable: sorted, a name a line, long lists of numbers on one line.
    """
    whole = {**content, "digest": digest(content)}
    lines = [f"{json.dumps(name)}: {_value(whole[name])}" for name in sorted(whole)]
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def json_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises
    ------
    ValueError
        When it is none; the message says what was expected and found.
    """
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("expected one JSON object, found none") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found a {type(content).__name__}")
    return content


def check_record(content: dict[str, Any], data: bytes) -> dict[str, Any]:
    """Return a record without its digest, after checking both digest and layout.

    Parameters
    ----------
    content
        What :func:`json_object` made of ``data``.

    Raises
    ------
    ValueError
        When a byte was changed; the message says what was expected and found.
    """
    rest = {name: value for name, value in content.items() if name != "digest"}
    expected = content.get("digest")
    try:
        sha256 = digest(rest)
        same = record_text(rest).encode() == data
    except (ValueError, RecursionError):
        raise ValueError("expected plain JSON values, found NaN or too many levels") from None
    if sha256 != expected:
        raise ValueError(f"expected digest {expected}, found {sha256}")
    if not same:
        raise ValueError("expected the layout that lm-calib writes, found other spacing")
    return rest


def _value(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        parts = [
            "{\n   "
            + ",\n   ".join(f"{json.dumps(k)}: {_line(part[k])}" for k in sorted(part))
            + "\n  }"
            for part in value
        ]
        return "[\n  " + ",\n  ".join(parts) + "\n ]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


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
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``path`` if the block succeeds.

    With ``replace`` a folder that is there makes way, and is deleted when the new one has its
    name. A process that is killed between the two leaves both, whole, under other names:
    :func:`restore` gives the old one its name back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        old = temporary.with_suffix(OLD) if replace and path.exists() else None
        if old is not None:
            path.replace(old)
        try:
            temporary.replace(path)
        except OSError:
            if old is not None:
                old.replace(path)
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore(path: Path) -> bool:
    """Give a folder its name back that it lost to a process killed while replacing it.

    What was replaced and not yet deleted goes.

    Returns
    -------
    Whether there was one without a name.
    """
    found = False
    for old in sorted(path.parent.glob(f".*{OLD}")):
        match = REPLACED.match(old.name)
        if match is None or match["target"] != path.name:
            continue
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.replace(path)
            found = True
    return found


@contextlib.contextmanager
def only_once(path: Path) -> Iterator[None]:
    """Hold an exclusive lock named after ``path``: two processes never make one artifact."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(path.with_name(path.name + ".lock"))):
        yield
