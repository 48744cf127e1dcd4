"""One kept artifact on disk: two files of fixed names, every changed byte of which is noticed.

The record names itself: it carries a digest of its own content, and the digest of the tensors.
Names of files are fixed here and never read from a file.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.storage import digest, file_digest

FORMAT = "lm-calib-plugin artifact"
FORMAT_VERSION = 1
RECORD, TENSORS = "record.json", "tensors.safetensors"
# What every record holds, and of which kind it is.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "request": str,
    "asked": dict,
    "key": str,
    "recipe": dict,
    "model": str,
    "model_name": str,
    "calibration": (dict, type(None)),
    "weights_digest": str,
    "created": (int, float),
    "seconds": (int, float),
    "versions": dict,
    "sha256": str,
    "bytes": int,
    "result": dict,
    "changes": dict,
    "grids": dict,
    "activations": (dict, type(None)),
    "kv_bits": (int, type(None)),
}


class DamagedError(CalibError):
    """An artifact that is not, byte for byte, what was written."""


class NewerError(CalibError):
    """An artifact that a newer version of this package wrote."""


def write_record(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the record of an artifact into its folder, beside the tensors.

    Raises
    ------
    ValueError
        When a number is NaN or infinite.
    """
    full = {"format": FORMAT, "format_version": FORMAT_VERSION, **content}
    (folder / RECORD).write_bytes(_rendered(full).encode())


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of an artifact, checked against its own digest; tensors are not read.

    Raises
    ------
    DamagedError
        When a file is missing, damaged, a link, or one too many.
    NewerError
        When the format is newer than this build reads.
    """
    _check_files(folder)
    file = folder / RECORD
    try:
        text = file.read_bytes()
        content = json.loads(text)
    except OSError as error:
        raise DamagedError(f"{file}: damaged: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError):
        raise DamagedError(f"{file}: damaged: expected one JSON object, found none.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedError(f"{file}: damaged: not the record of an artifact.")
    number = content.get("format_version")
    if type(number) is int and number > FORMAT_VERSION:
        raise NewerError(
            f"{file}: written in format {number}, this build reads up to {FORMAT_VERSION}; pip "
            "install --upgrade lm-calib-plugin."
        )
    expected = content.pop("digest", None)
    if digest(content) != expected:
        raise DamagedError(f"{file}: damaged: its content does not have the digest it claims.")
    if _rendered(content).encode() != text:
        raise DamagedError(f"{file}: damaged: expected the layout in which it was written.")
    for name, kind in _FIELDS.items():
        if name not in content or not isinstance(content[name], kind):
            raise DamagedError(f"{file}: damaged: `{name}` is missing or of another kind.")
    if content["request"] != folder.name:
        raise DamagedError(f"{file}: damaged: it belongs to {content['request'][:12]}.")
    return content


def check_tensors(folder: Path, record: Mapping[str, Any]) -> None:
    """Compare the tensors of an artifact with the digest in its record, byte for byte.

    Raises
    ------
    DamagedError
        When they differ.
    """
    file = folder / TENSORS
    try:
        size, found = file.stat().st_size, file_digest(file)
    except OSError as error:
        raise DamagedError(f"{file}: damaged: cannot be read ({error.strerror}).") from None
    if size != record["bytes"]:
        raise DamagedError(f"{file}: damaged: expected {record['bytes']} bytes, found {size}.")
    if found != record["sha256"]:
        raise DamagedError(f"{file}: damaged: expected sha256 {record['sha256']}, found {found}.")


def _check_files(folder: Path) -> None:
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise DamagedError(f"{folder}: damaged: not a folder.")
        found = {path.name: path.lstat().st_mode for path in folder.iterdir()}
    except OSError as error:
        raise DamagedError(f"{folder}: damaged: cannot be read ({error.strerror}).") from None
    for name in (RECORD, TENSORS):
        if not stat.S_ISREG(found.get(name, 0)):
            what = "not a plain file" if name in found else "missing"
            raise DamagedError(f"{folder / name}: damaged: {what}.")
    foreign = sorted(found.keys() - {RECORD, TENSORS})
    if foreign:
        raise DamagedError(f"{folder}: damaged: {foreign[0]!r} does not belong there.")


def _rendered(content: Mapping[str, Any]) -> str:
    """Return the one text of a record: sorted, one field a line."""
    whole = {**content, "digest": digest(content)}
    lines = [
        f"{json.dumps(name)}: {json.dumps(whole[name], sort_keys=True, allow_nan=False)}"
        for name in sorted(whole)
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"
