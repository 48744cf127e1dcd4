"""A folder that knows its files: the size and digest of each, in a list that knows its own.

Every changed, missing, cut or added file is noticed. The names in a list are judged before
anything is opened by them, and nothing outside the folder is ever read.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm_calib_plugin.errors import CalibError, UserError, listed
from lm_calib_plugin.export import names
from lm_calib_plugin.storage import (
    check_record,
    json_object,
    own_version,
    record_text,
    write_text,
)

LARGEST_LIST = 64 * 2**20  # bytes; a list of 200,000 files is smaller
LARGE = 512 * 2**20  # bytes from which reading is worth a progress bar
READERS = 4  # threads; sha256 runs outside the lock of the interpreter
_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What the hub, git and people put beside a model, and no program loads.
_HARMLESS_FOLDERS = (".cache", ".git")
_HARMLESS = (".gitattributes", ".gitignore", ".DS_Store", "LICENSE", "LICENCE", "NOTICE")
_HARMLESS_ENDINGS = (".md", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".pdf")


@dataclass(frozen=True)
class Kind:
    """What a folder is: the name of its list, and what is said to people.

    Parameters
    ----------
    file
        Name of the list.
    format, version
        What stands in it.
    what
        Such as ``an exported model``.
    made_by, again
        How to get one, and what to do with one that is damaged.
    edited
        Names of files that people write on and no program loads: a change is a note.
    """

    file: str
    format: str
    version: int
    what: str
    made_by: str
    again: str
    edited: tuple[str, ...] = ()

    def damaged(self, file: Path, what: str) -> CalibError:
        """Return the error of a file that is not what the list says."""
        return CalibError(f"{file}: damaged: {what}; {self.again}.")


@dataclass(frozen=True)
class Row:
    """Size in bytes and sha256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What a list says.

    Parameters
    ----------
    folder
        Where it stands.
    facts
        What its maker wrote about the folder.
    files
        Relative posix path -> size and digest of every other file.
    version
        Of this package, when the list was written.
    notes
        Files that the list does not know, and that no program loads.
    """

    folder: Path
    facts: dict[str, Any]
    files: dict[str, Row]
    version: str
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(row.bytes for row in self.files.values())


def write_list(folder: Path, kind: Kind, facts: Mapping[str, Any]) -> Record:
    """Write the list of a folder that is complete but for it; an earlier list is replaced.

    Raises
    ------
    CalibError
        When the folder holds something that could not be read back: a link, a name that not
        every system takes, a format that runs code.
    """
    found = {name: path for name, path in _walk(folder, kind) if name != kind.file}
    for name, path in found.items():
        why = names.fault(name) or ("may run code when read" if names.runs_code(name) else None)
        if why:
            raise CalibError(f"{path}: can not be part of {kind.what}: its name {why}.")
        if path.is_symlink():
            raise CalibError(f"{path}: can not be part of {kind.what}: it is a link.")
    again = names.twice(found)
    if again:
        raise CalibError(f"{folder / again}: another name differs in letter case alone.")
    sizes = {name: path.stat().st_size for name, path in found.items()}
    digests = _digests(found, sizes, kind)
    files = {name: Row(sizes[name], digests[name]) for name in sorted(found)}
    content = {
        "format": kind.format,
        "format_version": kind.version,
        "lm_calib_plugin": own_version(),
        "facts": dict(facts),
        "files": [
            {"name": name, "bytes": row.bytes, "sha256": row.sha256} for name, row in files.items()
        ],
    }
    write_text(folder / kind.file, record_text(content))
    return Record(folder, dict(facts), files, own_version())


def read_list(folder: Path, kind: Kind) -> Record:
    """Read a list alone, checked against its own digest, with every name judged.

    Raises
    ------
    UserError
        When there is no such folder, it has no list, or a newer version wrote it.
    CalibError
        When the list is damaged, or names what it must not.
    """
    file = folder / kind.file
    content, data = _content(folder, kind)
    number = content.get("format_version")
    if content.get("format") != kind.format or type(number) is not int:
        raise UserError("folder", f"{file} is not the list of {kind.what}", kind.made_by)
    if number > kind.version:
        raise UserError(
            "folder",
            f"{file} is written in format {number}",
            f"this build reads up to {kind.version}",
            "pip install --upgrade lm-calib-plugin",
        )
    try:
        content = check_record(content, data)
    except ValueError as error:
        raise kind.damaged(file, str(error)) from None
    facts = content.get("facts")
    if not isinstance(facts, dict):
        raise kind.damaged(file, f"expected facts by name, found a {type(facts).__name__}")
    files = _rows(file, content.get("files"), kind)
    return Record(folder, facts, files, str(content.get("lm_calib_plugin")))


def verify(folder: Path, kind: Kind, *, progress: bool = True) -> Record:
    """Read a folder completely, and return its list if every file is what it says.

    Raises
    ------
    UserError, CalibError
        As :func:`read_list`; when a file is changed, cut, missing, a link, or not in the list
        although programs might load it. The file is named, with what was expected and found.
    """
    record = read_list(folder, kind)
    found = {name: path for name, path in _walk(folder, kind) if name != kind.file}
    paths: dict[str, Path] = {}
    for name, row in record.files.items():
        path = folder / name
        if name not in found:
            raise kind.damaged(path, f"expected a file of {row.bytes} bytes, found none")
        size = _size(path, folder, kind)
        if size != row.bytes and name not in kind.edited:
            raise kind.damaged(path, f"expected {row.bytes} bytes, found {size}")
        paths[name] = path
    notes = []
    for name in sorted(found.keys() - record.files.keys()):
        if not _harmless(name):
            raise CalibError(
                f"{folder / name}: not one of the files of {kind.what}, and programs might load "
                f"it: {kind.file} does not know it; move it out of the folder."
            )
        notes.append(f"{name} is not in {kind.file}")
    sizes = {name: row.bytes for name, row in record.files.items()}
    digests = _digests(paths, sizes, kind, progress=progress)
    wrong = [name for name, row in record.files.items() if row.sha256 != digests[name]]
    notes += [f"{name} was edited" for name in wrong if name in kind.edited]
    wrong = [name for name in wrong if name not in kind.edited]
    if wrong:
        expected, have = record.files[wrong[0]].sha256, digests[wrong[0]]
        more = f" ({listed(wrong[1:6])} too)" if wrong[1:] else ""
        raise kind.damaged(folder / wrong[0], f"expected sha256 {expected}, found {have}{more}")
    return Record(folder, record.facts, record.files, record.version, tuple(notes))


def read_small(record: Record, name: str, kind: Kind, limit: int = 256 * 2**20) -> bytes | None:
    """Return one file of a list, checked against it; None when the list does not name it.

    Raises
    ------
    CalibError
        When it is not what the list says, or larger than ``limit`` bytes.
    """
    row = record.files.get(name)
    if row is None:
        return None
    path = record.folder / name
    size = _size(path, record.folder, kind)
    if size != row.bytes:
        raise kind.damaged(path, f"expected {row.bytes} bytes, found {size}")
    if size > limit:
        raise CalibError(f"{path}: has {size} bytes; at most {limit} are read at once.")
    data = _read(path, kind)
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != row.sha256:
        raise kind.damaged(path, f"expected sha256 {row.sha256}, found {sha256}")
    return data


def _content(folder: Path, kind: Kind) -> tuple[dict[str, Any], bytes]:
    file = folder / kind.file
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"no folder {str(folder)!r}"
        raise UserError("folder", what, f"the folder of {kind.what} is needed", kind.made_by)
    if not os.path.lexists(file):
        there = sorted(path.name for path in folder.iterdir())[:6]
        raise UserError(
            "folder",
            f"{str(folder)!r} holds no {kind.file} (there: {listed(there) or 'nothing'})",
            f"the folder of {kind.what} is needed",
            kind.made_by,
        )
    size = _size(file, folder, kind)
    if size > LARGEST_LIST:
        raise kind.damaged(file, f"expected at most {LARGEST_LIST} bytes, found {size}")
    data = _read(file, kind)
    try:
        return json_object(data), data
    except ValueError as error:
        raise kind.damaged(file, str(error)) from None


def _rows(file: Path, rows: Any, kind: Kind) -> dict[str, Row]:
    if not isinstance(rows, list):
        raise kind.damaged(file, f"expected a list of files, found a {type(rows).__name__}")
    files: dict[str, Row] = {}
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"name", "bytes", "sha256"}:
            raise kind.damaged(file, "expected name, bytes and sha256 of every file")
        name, size, sha256 = row["name"], row["bytes"], row["sha256"]
        why = names.fault(name)
        if why is None and name.casefold() == kind.file.casefold():
            why = "is the list itself"
        if why is None and names.runs_code(name):
            why = "is of a format that may run code when read"
        if why:
            raise CalibError(
                f"{file}: names {name!r}, which {why}: nothing was read; do not use this folder, "
                "it was made to do harm or is damaged."
            )
        if type(size) is not int or size < 0 or not isinstance(sha256, str):
            raise kind.damaged(file, f"expected a size and a digest of {name}")
        if not _SHA256.fullmatch(sha256):
            raise kind.damaged(file, f"expected a sha256 of {name}, found {sha256[:80]!r}")
        files[name] = Row(size, sha256)
    twice = names.twice(row["name"] for row in rows)
    if twice is not None:
        raise kind.damaged(file, f"expected every file once, found {twice} twice")
    return files


def _walk(folder: Path, kind: Kind) -> Iterator[tuple[str, Path]]:
    """Yield relative posix path and path of everything but plain folders; follow no link."""

    def stop(error: OSError) -> None:
        raise kind.damaged(Path(str(error.filename)), f"cannot be read ({error.strerror})")

    for place, folders, files in os.walk(folder, onerror=stop):
        here = Path(place)
        if here == folder:
            folders[:] = [name for name in folders if name not in _HARMLESS_FOLDERS]
        for name in [*files, *(name for name in folders if (here / name).is_symlink())]:
            yield (here / name).relative_to(folder).as_posix(), here / name


def _size(path: Path, folder: Path, kind: Kind) -> int:
    """Return the size of a plain file; a link is one only inside the cache of the hub."""
    try:
        for place in path.parents:
            if place == folder:
                break
            if place.is_symlink():
                raise CalibError(
                    f"{place}: is a link: it might lead anywhere; put the files there."
                )
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode):
            if not _in_hub_cache(path, folder):
                raise CalibError(f"{path}: is a link: it might lead anywhere; put the file there.")
            found = path.stat()
    except OSError as error:
        raise kind.damaged(path, f"cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):
        raise kind.damaged(path, "expected a plain file, found something else")
    return found.st_size


def _in_hub_cache(path: Path, folder: Path) -> bool:
    """Tell whether a link is one of those that huggingface_hub makes: to the blobs of a model.

    The folder is MODEL/snapshots/COMMIT or one inside it.
    """
    real = path.resolve().parent
    return any(
        place.name == "snapshots" and real == place.parent / "blobs"
        for place in folder.resolve().parents
    )


def _read(path: Path, kind: Kind) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise kind.damaged(path, f"cannot be read ({error.strerror})") from None


def _digests(
    paths: Mapping[str, Path], sizes: Mapping[str, int], kind: Kind, *, progress: bool = True
) -> dict[str, str]:
    """Return the sha256 of every file, read by several threads, large files first."""
    total = sum(sizes.values())
    bar = tqdm(
        total=total,
        desc="digests",
        unit="B",
        unit_scale=True,
        disable=not progress or total < LARGE,
    )

    def one(name: str) -> str:
        found = hashlib.sha256()
        try:
            with paths[name].open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    found.update(chunk)
                    bar.update(len(chunk))
        except OSError as error:
            raise kind.damaged(paths[name], f"cannot be read ({error.strerror})") from None
        return found.hexdigest()

    order = sorted(paths, key=lambda name: -sizes[name])
    with bar, ThreadPoolExecutor(READERS) as pool:
        return dict(zip(order, pool.map(one, order), strict=True))


def _harmless(name: str) -> bool:
    first, _, rest = name.partition("/")
    if rest:
        return False
    return first in _HARMLESS or name.lower().endswith(_HARMLESS_ENDINGS)
