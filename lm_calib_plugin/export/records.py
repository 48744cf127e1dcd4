"""What stands beside the weights of an exported folder, written, and read without trust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lm_calib_plugin import recipe_file
from lm_calib_plugin.calibration import set_folder
from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.export import file_list, names
from lm_calib_plugin.export.file_list import Kind, Record
from lm_calib_plugin.export.headers import read_header
from lm_calib_plugin.export.options import CALIB_CONFIG, CALIBRATION, CARD, FILES, RECIPE, REPORT
from lm_calib_plugin.export.published import publishable
from lm_calib_plugin.storage import json_object

if TYPE_CHECKING:
    from lm_calib_plugin.calibration import CalibrationSet

MODEL = Kind(
    file=FILES,
    format="lm-calib-plugin exported model",
    version=1,
    what="an exported model",
    made_by="lm-calib export makes one",
    again="download it again, or export it again with lm-calib export",
    edited=(CARD,),
)
CALIBRATION_FORMAT = "lm-calib-plugin calibration record"
LARGEST_RECIPE = 2**18  # bytes
MOST_BRACKETS, MOST_ALIASES, MOST_LEVELS = 512, 16, 32  # in a recipe
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@dataclass(frozen=True)
class Summary:
    """What an exported folder says about itself; its weights are not read.

    Parameters
    ----------
    record
        The list of its files.
    config, recipe, report, calibration
        Contents of ``calib_config.json``, ``recipe.yaml``, ``report.json`` and
        ``calibration.json``; None where there is no such file.
    """

    record: Record
    config: dict[str, Any] | None
    recipe: dict[str, Any] | None
    report: dict[str, Any] | None
    calibration: dict[str, Any] | None


def write_files_record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``calib_files.json``: size and sha256 of every other file, and these facts.

    Parameters
    ----------
    folder
        Complete but for this file.
    facts
        Plain values: key, digests, format, base model, results of checks.

    Raises
    ------
    CalibError
        When the folder holds something that could not be read back, such as a link.
    """
    file_list.write_list(folder, MODEL, facts)


def read_files_record(folder: str | Path) -> Record:
    """Read ``calib_files.json`` alone; it is checked against its own digest.

    Raises
    ------
    UserError, CalibError
        As :func:`verify_folder`, without a look at any other file.
    """
    return file_list.read_list(Path(folder), MODEL)


def verify_folder(folder: str | Path, *, progress: bool = True) -> Record:
    """Return the record of an exported folder if every byte of it is as it was written.

    Raises
    ------
    UserError
        When there is no such folder, it was not exported, or a newer version wrote it.
    CalibError
        When a file is changed, cut, missing, a link, or added although programs might load it,
        or when the index of the weights names others than there are. The file is named, with
        what was expected, what was found, and what to do.
    """
    place = Path(folder)
    record = file_list.verify(place, MODEL, progress=progress)
    if CONFIG not in record.files:
        raise MODEL.damaged(place / CONFIG, "expected in every exported model, found none")
    check_index(record)
    return record


def read_summary(folder: str | Path) -> Summary:
    """Read what a folder says about itself; small files are checked, weights are not read.

    Raises
    ------
    UserError, CalibError
        As :func:`verify_folder`, for the files that are read.
    """
    record = read_files_record(folder)
    return Summary(
        record,
        config=_json(record, CALIB_CONFIG),
        recipe=_recipe(record),
        report=_json(record, REPORT),
        calibration=_json(record, CALIBRATION),
    )


def calibration_record(calibration: CalibrationSet) -> dict[str, Any]:
    """Return the content of ``calibration.json``: what a set is and comes from, not its tokens.

    It is published: of a local path that was typed the last part alone is kept.
    """
    return {
        "format": CALIBRATION_FORMAT,
        "format_version": 1,
        **publishable(set_folder.describe(calibration)),
    }


def check_index(record: Record) -> None:
    """Raise a CalibError unless the index of the weights fits the files that are there."""
    shards = sorted(name for name in record.files if name.endswith(".safetensors"))
    shards = [name for name in shards if "/" not in name]
    content = _json(record, INDEX)
    file = record.folder / INDEX
    if content is None:
        if shards != [WEIGHTS]:
            raise MODEL.damaged(
                record.folder / WEIGHTS, f"expected this file of weights alone, found {shards}"
            )
        read_header(record.folder / WEIGHTS)
        return
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise MODEL.damaged(file, "expected a weight_map, found none")
    for tensor, name in places.items():
        why = names.fault(name)
        if why:
            raise CalibError(
                f"{file}: {tensor!r} is said to be in {name!r}, which {why}: nothing was loaded; "
                "do not use this folder."
            )
        if name not in shards:
            raise MODEL.damaged(file, f"expected one of {shards} for {tensor!r}, found {name!r}")
    for name in shards:
        if name not in places.values():
            raise MODEL.damaged(file, f"expected an entry for every file, found none for {name}")
        inside = set(read_header(record.folder / name).tensors)
        told = {tensor for tensor, place in places.items() if place == name}
        if inside != told:
            odd = min(inside ^ told)
            found = "only in the file" if odd in inside else "only in the index"
            raise MODEL.damaged(file, f"expected the tensors of {name}, found {odd!r} {found}")


def _json(record: Record, name: str) -> dict[str, Any] | None:
    data = file_list.read_small(record, name, MODEL)
    if data is None:
        return None
    try:
        return json_object(data)
    except ValueError as error:
        raise MODEL.damaged(record.folder / name, str(error)) from None


def _recipe(record: Record) -> dict[str, Any] | None:
    data = file_list.read_small(record, RECIPE, MODEL, limit=LARGEST_RECIPE)
    if data is None:
        return None
    file = record.folder / RECIPE
    try:
        _check_yaml(data)
        return recipe_file.read_recipe_file(file)[0]
    except (ValueError, yaml.YAMLError) as error:
        raise MODEL.damaged(file, f"expected a recipe ({error})") from None


def _check_yaml(data: bytes) -> None:
    """Raise a ValueError for a small text that stands for terabytes, or takes hours to read."""
    if data.count(b"[") + data.count(b"{") > MOST_BRACKETS:
        raise ValueError("found many brackets")
    aliases = depth = 0
    for event in yaml.parse(data, yaml.SafeLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if aliases > MOST_ALIASES:
            raise ValueError("found many aliases")
        if depth > MOST_LEVELS:
            raise ValueError("found many levels")
