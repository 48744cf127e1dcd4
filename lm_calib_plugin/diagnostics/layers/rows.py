"""The rows and the recipe of a record, taken back without trust."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import LayerRow

_NUMBERS = (
    "removed", "bits", "error_calibration", "error_heldout", "damp", "tokens", "borrowed",
    "stored_bits", "scale_min", "scale_median", "scale_max", "clipped", "input_limit",
    "input_limit_rest",
)  # fmt: skip
_GIVEN = "given"


def read_table(content: Mapping[str, Any], place: Path) -> tuple[str, dict[str, Any]]:
    """Return key and contents of a side file, as arguments of a run.

    Raises
    ------
    CalibError
        When something is not of the kind that a report holds; ``place`` is named.
    """
    key, layers, left = content.get("key"), content.get("layers"), content.get("left_dense", [])
    transforms, structure = content.get("transforms", []), content.get("structure")
    whole = isinstance(key, str) and all(
        isinstance(part, list) and all(isinstance(one, dict) for one in part)
        for part in (layers, left, transforms)
    )
    if not whole or not (structure is None or isinstance(structure, dict)):
        raise CalibError(f"{place}: expected key, layers, left_dense and transforms of a report.")
    return str(key), {
        "rows": [_row(one, place) for one in layers or ()],
        "left_dense": [(str(one.get("name")), str(one.get("why"))) for one in left],
        "transforms": transforms,
        "structure": structure,
    }


def _row(one: Mapping[str, Any], place: Path) -> LayerRow:
    name, shape = one.get("name"), one.get("shape")
    if not isinstance(name, str) or not (
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)
    ):
        raise CalibError(f"{place}: expected name and shape of a layer, found {name!r}, {shape!r}.")
    for field_name in _NUMBERS:
        value = one.get(field_name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise CalibError(f"{place}: {name}: expected a number for {field_name}, not {value!r}.")
    known = {f.name for f in dataclasses.fields(LayerRow)} - {"execution", "seconds"}
    given = {field_name: value for field_name, value in one.items() if field_name in known}
    empty = dict.fromkeys(("bits", "error_calibration", "error_heldout", "damp", "tokens"))
    given = empty | {"removed": 0.0} | given
    return LayerRow(**{**given, "shape": (shape[0], shape[1])}, seconds=0.0)


def read_recipe(metadata: dict[str, Any]) -> tuple[Recipe | None, str]:
    """Return the recipe of a record, checked as one that was typed, or why there is none."""
    if not metadata:
        return None, "it names no recipe"
    if metadata.get("calibration") == _GIVEN:
        return None, "its calibration set was given in memory"
    try:
        return Recipe(**metadata), ""
    except (UserError, TypeError) as error:
        return None, f"its recipe can not be used here ({error})"
