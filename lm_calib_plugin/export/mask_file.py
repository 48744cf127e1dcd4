"""One file of weights as bit masks and non-zero elements, read and written piece by piece."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.export.headers import ITEM_BYTES, Header, Stored, parse_header, read_header

FORMAT, FORMAT_VERSION = "lm-calib-plugin bit mask", "1"
PIECE = 1 << 18  # elements held at once; a multiple of 8
_FLOATS = ("F16", "BF16", "F32", "F64")
# Elements are looked at as bits: -0.0 and every NaN come back as they were.
_BITS: dict[int, Any] = {2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


class Sink(Protocol):
    """What takes the bytes of a file in their order."""

    def write(self, data: Any, /) -> Any:
        """Take some bytes."""


@dataclass(frozen=True)
class Plan:
    """How the tensors of a file are kept.

    Parameters
    ----------
    original
        Header of the file itself.
    kept
        Number of non-zero elements of every tensor kept as a mask, by its place in the file.
    packed
        Header of the packed file. Its tensors are named by the places of the original ones:
        ``3`` as it is, or ``3.mask`` and ``3.values``.
    """

    original: Header
    kept: dict[int, int]
    packed: Header

    @property
    def saves(self) -> int:
        """Bytes by which the packed file is smaller."""
        return self.original.file_bytes - self.packed.file_bytes


def plan(file: Path, original: Header) -> Plan:
    """Count zeros, and say how each tensor is best kept: matrices as masks where that saves."""
    kept: dict[int, int] = {}
    with file.open("rb") as stream:
        for place, row in enumerate(original.tensors.values()):
            if row.dtype not in _FLOATS or len(row.shape) < 2:
                continue
            stream.seek(original.start + row.begin)
            count = sum(
                int(np.count_nonzero(_read(stream, size, _bits(row), file)))
                for size in _pieces(row.elements)
            )
            if _mask_bytes(row) + count * ITEM_BYTES[row.dtype] < row.bytes:
                kept[place] = count
    return Plan(original, kept, _packed_header(original, kept))


def write(
    source: Path, plan: Plan, target: Path, done: Callable[[int], Any] = lambda size: None
) -> None:
    """Write the packed file.

    Parameters
    ----------
    done
        Is told how many bytes of the source were dealt with.
    """
    start = plan.packed.start
    with source.open("rb") as read, target.open("xb") as out:
        out.write(struct.pack("<Q", len(plan.packed.raw)) + plan.packed.raw)
        for place, row in enumerate(plan.original.tensors.values()):
            read.seek(plan.original.start + row.begin)
            if place not in plan.kept:
                out.seek(start + plan.packed.tensors[str(place)].begin)
                for size in _pieces(row.bytes):
                    out.write(_read(read, size, np.dtype("u1"), source))
                    done(size)
                continue
            mask = start + plan.packed.tensors[f"{place}.mask"].begin
            values = start + plan.packed.tensors[f"{place}.values"].begin
            for size in _pieces(row.elements):
                piece = _read(read, size, _bits(row), source)
                there = piece != 0
                out.seek(mask)
                mask += out.write(np.packbits(there, bitorder="little"))
                out.seek(values)
                values += out.write(piece.take(np.flatnonzero(there)))
                done(piece.nbytes)


def read_plan(file: Path) -> Plan:
    """Return how the tensors of a packed file are kept; every size is checked, none is trusted.

    Raises
    ------
    CalibError
        When it is no packed file, or its sizes do not fit each other.
    """
    packed = read_header(file)
    if packed.metadata.get("format") != FORMAT:
        raise CalibError(f"{file}: is no file of bit masks.")
    if packed.metadata.get("format_version") != FORMAT_VERSION:
        raise CalibError(
            f"{file}: is of format {packed.metadata.get('format_version')!r}, this build reads "
            f"{FORMAT_VERSION}; pip install --upgrade lm-calib-plugin."
        )
    try:
        original = parse_header(packed.metadata.get("header", "").encode())
        kept = {
            place: _kept(place, row, packed)
            for place, row in enumerate(original.tensors.values())
            if f"{place}.mask" in packed.tensors
        }
        expected = _packed_header(original, kept)
    except (KeyError, ValueError) as error:
        raise CalibError(f"{file}: damaged: its sizes do not fit: {error}.") from None
    if expected.tensors != packed.tensors:
        raise CalibError(f"{file}: damaged: it holds other tensors than it says.")
    return Plan(original, kept, packed)


def unpack(file: Path, plan: Plan, sink: Sink) -> None:
    """Give the bytes of the original file to ``sink``, in their order.

    Raises
    ------
    CalibError
        When a mask does not have as many bits as there are values.
    """
    start, raw = plan.packed.start, plan.original.raw
    sink.write(struct.pack("<Q", len(raw)) + raw)
    with file.open("rb") as masks, file.open("rb") as values:
        for place, row in enumerate(plan.original.tensors.values()):
            if place not in plan.kept:
                values.seek(start + plan.packed.tensors[str(place)].begin)
                for size in _pieces(row.bytes):
                    sink.write(_read(values, size, np.dtype("u1"), file))
                continue
            masks.seek(start + plan.packed.tensors[f"{place}.mask"].begin)
            values.seek(start + plan.packed.tensors[f"{place}.values"].begin)
            left = plan.kept[place]
            for size in _pieces(row.elements):
                packed = _read(masks, -(-size // 8), np.dtype("u1"), file)
                bits = np.unpackbits(packed, bitorder="little")
                count = int(np.count_nonzero(bits))
                if count > left or bits[size:].any():
                    raise _unfit(file, place, plan.kept[place])
                left -= count
                piece = np.zeros(size, _bits(row))
                # By places: four times as fast as by truth values.
                piece[np.flatnonzero(bits)] = _read(values, count, _bits(row), file)
                sink.write(piece)
            if left:
                raise _unfit(file, place, plan.kept[place])


def _kept(place: int, row: Stored, packed: Header) -> int:
    if row.dtype not in _FLOATS:
        raise ValueError(f"{row.dtype} is not kept as a mask")
    (count,) = packed.tensors[f"{place}.values"].shape
    if count > row.elements:
        raise ValueError(f"{count} values for {row.elements} elements")
    return count


def _packed_header(original: Header, kept: dict[int, int]) -> Header:
    parts: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for place, row in enumerate(original.tensors.values()):
        if place in kept:
            count = kept[place]
            parts[f"{place}.values"] = (row.dtype, (count,), count * ITEM_BYTES[row.dtype])
            parts[f"{place}.mask"] = ("U8", (_mask_bytes(row),), _mask_bytes(row))
        else:
            parts[str(place)] = (row.dtype, row.shape, row.bytes)
    # Wide elements first: every tensor begins at a multiple of its own width.
    order = sorted(parts, key=lambda name: -ITEM_BYTES.get(parts[name][0], 1))
    rows, begin = {}, 0
    for name in order:
        dtype, shape, size = parts[name]
        rows[name] = Stored(dtype, shape, begin, begin + size)
        begin += size
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "header": original.raw.decode("utf-8"),
    }
    content = {"__metadata__": metadata} | {
        name: {"dtype": row.dtype, "shape": list(row.shape), "data_offsets": [row.begin, row.end]}
        for name, row in rows.items()
    }
    raw = json.dumps(content, separators=(",", ":")).encode()
    return Header(raw + b" " * (-len(raw) % 8), rows, metadata)


def _unfit(file: Path, place: int, count: int) -> CalibError:
    return CalibError(
        f"{file}: damaged: expected {count} bits set in the mask of tensor {place}, found another "
        "number."
    )


def _bits(row: Stored) -> np.dtype[Any]:
    found: np.dtype[Any] = _BITS[ITEM_BYTES[row.dtype]]
    return found


def _mask_bytes(row: Stored) -> int:
    return -(-row.elements // 8)


def _pieces(total: int) -> list[int]:
    whole, rest = divmod(total, PIECE)
    return [PIECE] * whole + [rest] * bool(rest)


def _read(stream: BinaryIO, count: int, dtype: np.dtype[Any], file: Path) -> NDArray[Any]:
    piece = np.empty(count, dtype)
    got = stream.readinto(piece.data.cast("B")) if count else 0  # type: ignore[attr-defined]
    if got != piece.nbytes:
        raise CalibError(f"{file}: damaged: ends before its header says.")
    return piece
