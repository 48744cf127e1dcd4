"""The header of a safetensors file, read without trust and without any tensor."""

from __future__ import annotations

import itertools
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import CalibError

LARGEST_HEADER = 100_000_000  # bytes, the limit that safetensors sets
# Bytes of an element; kinds that are not listed are known by their place in the file alone.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: kind, shape, and its bytes ``[begin, end)`` after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """The beginning of a file.

    Parameters
    ----------
    raw
        Its JSON text as it stands there, padding included.
    tensors
        In the order of their bytes, which follow each other without a gap.
    metadata
        Texts by name.
    """

    raw: bytes
    tensors: dict[str, Stored]
    metadata: dict[str, str]

    @property
    def start(self) -> int:
        """Where the bytes of the first tensor begin in the file."""
        return 8 + len(self.raw)

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.start + max((row.end for row in self.tensors.values()), default=0)


def read_header(file: Path) -> Header:
    """Return the header of a file.

    Raises
    ------
    CalibError
        When it is not that of a safetensors file, or does not fit the size of the file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))[0]
            if length > min(LARGEST_HEADER, size - 8):
                raise ValueError(f"{length} bytes are not there")
            header = parse_header(stream.read(length))
    except OSError as error:
        raise CalibError(f"{file}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise CalibError(
            f"{file}: damaged: not the header of a safetensors file: {error}."
        ) from None
    if header.file_bytes != size:
        raise CalibError(
            f"{file}: damaged: expected {header.file_bytes} bytes by its header, found {size}."
        )
    return header


def parse_header(raw: bytes) -> Header:
    """Return what a header says.

    Raises
    ------
    ValueError
        When it is not one: other JSON, sizes that do not fit shapes, gaps or overlaps.
    """
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("too many levels") from None
    if not isinstance(content, dict):
        raise ValueError("expected tensors by name")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("expected texts as metadata")
    rows = {name: _stored(name, row) for name, row in content.items()}
    ordered = dict(sorted(rows.items(), key=lambda item: (item[1].begin, item[1].end)))
    places = [(0, 0), *((row.begin, row.end) for row in ordered.values())]
    for (_, end), (begin, _) in itertools.pairwise(places):
        if begin != end:
            raise ValueError("tensors overlap, or leave a gap")
    return Header(raw, ordered, metadata)


def _stored(name: str, row: Any) -> Stored:
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r}: expected plain numbers")
    stored = Stored(dtype, tuple(shape), *offsets)
    known = ITEM_BYTES.get(dtype)
    if stored.bytes < 0 or (known is not None and stored.bytes != known * stored.elements):
        raise ValueError(f"{name!r}: {stored.bytes} bytes do not fit shape {shape}")
    return stored


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found
