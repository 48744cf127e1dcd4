"""An archive of pruned folders, for disk and transfer: zeros take one bit, not sixteen.

A matrix with zeros is kept as a bit mask (bit ``i % 8`` of byte ``i // 8``, lowest first, tells
whether element ``i`` has any bit set) and its non-zero elements in their order; everything else as
it is. A half-precision matrix with a fraction ``s`` of zeros takes ``1 - s + 1/16`` of its size.
Unpacking gives the folder back byte for byte. Nothing runs faster from it: programs load the
folder that comes out.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.export import file_list, mask_file
from lm_calib_plugin.export.file_list import LARGE, Kind, Record
from lm_calib_plugin.export.headers import read_header
from lm_calib_plugin.export.options import FILES
from lm_calib_plugin.export.records import CONFIG, MODEL, verify_folder
from lm_calib_plugin.storage import json_object, new_folder, require_space

PACKED_ENDING = ".bitmask.safetensors"
ENDING = ".safetensors"
ARCHIVE = Kind(
    file="calib_archive.json",
    format="lm-calib-plugin bitmask archive",
    version=1,
    what="a bitmask archive",
    made_by="lm-calib pack makes one",
    again="download it again, or make it again with lm-calib pack",
)


@dataclass(frozen=True)
class Sizes:
    """Bytes of all files of a folder, and of its archive."""

    folder: int
    archive: int


def pack_folder(folder: str | Path, archive: str | Path, *, progress: bool = True) -> Sizes:
    """Make an archive of an exported folder; both are whole, or there is no archive.

    Parameters
    ----------
    folder
        An exported folder of ordinary numbers; it is verified first, and left as it is.
    archive
        A folder that does not exist yet.

    Raises
    ------
    UserError
        When the folder is of quantized weights, holds too few zeros, or ``archive`` exists.
    CalibError
        When the folder is damaged.
    """
    source, target = Path(folder), Path(archive)
    _check_target("archive", source, target)
    _check_plain(file_list.read_list(source, MODEL))
    record = verify_folder(source, progress=progress)
    plans = {}
    for name in _weights(record):
        plan = mask_file.plan(source / name, read_header(source / name))
        if plan.saves > 0:
            plans[name] = plan
    saved = sum(plan.saves for plan in plans.values())
    if saved <= 0:
        raise UserError(
            "folder",
            f"{source} has no matrix with enough zeros to be smaller as a mask",
            "a pruned model, with more than one zero in sixteen half-precision weights",
            "keep the folder as it is",
        )
    require_space(target.parent, record.bytes - saved + 2**20, target.name)
    with new_folder(target) as temporary, _bar("packing", record.bytes, progress) as bar:
        shutil.copyfile(source / FILES, temporary / FILES)
        for name, row in record.files.items():
            if name not in plans:
                _copy(source / name, temporary / name)
                bar.update(row.bytes)
                continue
            file = temporary / _packed_name(name)
            mask_file.write(source / name, plans[name], file, bar.update)
            # Whoever packs may delete the folder: see first that it comes back.
            sink = _Digest()
            mask_file.unpack(file, mask_file.read_plan(file), sink)
            if sink.sha256.hexdigest() != row.sha256:
                raise CalibError(f"{source / name}: changed while it was packed; try again.")
        packed = {name: record.files[name].bytes for name in plans}
        made = file_list.write_list(temporary, ARCHIVE, {"packed": packed, "model": record.facts})
    return Sizes(record.bytes, made.bytes)


def unpack_folder(archive: str | Path, out: str | Path, *, progress: bool = True) -> Record:
    """Make the folder again that was packed, byte for byte; it is whole, or there is none.

    Returns
    -------
    Record
        Of the new folder, verified.

    Raises
    ------
    UserError
        When there is no archive, a newer version wrote it, or ``out`` exists.
    CalibError
        When a file of the archive is damaged, or was made to do harm.
    """
    source, target = Path(archive), Path(out)
    _check_target("out", source, target)
    held = file_list.verify(source, ARCHIVE, progress=progress)
    if FILES not in held.files:
        raise ARCHIVE.damaged(source / FILES, "expected in every archive, found none")
    model = file_list.read_list(source, MODEL)
    places = _places(held, model)
    plans = {
        name: mask_file.read_plan(source / place) for name, place in places.items() if place != name
    }
    for name, plan in plans.items():
        # What a mask says is nothing to make room for before it fits what was packed.
        told, size = plan.original.file_bytes, model.files[name].bytes
        if told != size:
            raise ARCHIVE.damaged(
                source / places[name], f"expected a file of {size} bytes inside, found {told}"
            )
    require_space(target.parent, model.bytes + 2**20, target.name)
    with new_folder(target) as temporary:
        shutil.copyfile(source / FILES, temporary / FILES)
        with _bar("unpacking", model.bytes, progress) as bar:
            for name, row in model.files.items():
                if name not in plans:
                    _copy(source / name, temporary / name)
                else:
                    with (temporary / name).open("wb") as stream:
                        mask_file.unpack(source / places[name], plans[name], stream)
                bar.update(row.bytes)
        try:
            verify_folder(temporary, progress=progress)
        except CalibError as error:
            said = str(error).replace(str(temporary), str(target))
            raise CalibError(f"{source}: does not give back what was packed: {said}") from None
    return file_list.read_list(target, MODEL)


class _Digest:
    """Takes the bytes of a file for their digest alone."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> None:
        self.sha256.update(data)


def _places(held: Record, model: Record) -> dict[str, str]:
    """Return name in the folder -> name in the archive, of every file."""
    places = {}
    for name in model.files:
        packed = _packed_name(name) if name.endswith(ENDING) else name
        places[name] = packed if packed in held.files else name
        if places[name] not in held.files:
            raise ARCHIVE.damaged(held.folder / name, "expected in the archive, found none")
    odd = sorted(held.files.keys() - {*places.values(), FILES})
    if odd:
        raise ARCHIVE.damaged(
            held.folder / odd[0], f"expected what {FILES} names, found another file"
        )
    return places


def _check_plain(record: Record) -> None:
    data = file_list.read_small(record, CONFIG, MODEL)
    try:
        config = json_object(data or b"{}")
    except ValueError as error:
        raise MODEL.damaged(record.folder / CONFIG, str(error)) from None
    if config.get("quantization_config"):
        raise UserError(
            "folder",
            f"{record.folder} holds quantized weights, which are packed already",
            "a pruned model of ordinary numbers (export it with the format dense)",
        )


def _check_target(argument: str, source: Path, target: Path) -> None:
    if os.path.lexists(target):
        raise UserError(argument, f"{target} exists", "a new folder", "name another one")
    if source.resolve() in target.resolve().parents:
        raise UserError(argument, f"{target} is inside {source}", "a folder elsewhere")


def _weights(record: Record) -> Iterator[str]:
    for name in record.files:
        if name.endswith(PACKED_ENDING):
            raise UserError(
                "folder", f"{record.folder / name} has the name of a packed file", "another name"
            )
        if name.endswith(ENDING) and "/" not in name:
            yield name


def _packed_name(name: str) -> str:
    return name.removesuffix(ENDING) + PACKED_ENDING


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _bar(what: str, total: int, progress: bool) -> tqdm[Any]:
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=not progress or total < LARGE,
    )
