"""Grids of quantized layers as plain values and tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.artifacts.changes import NotKeptError
from lm_calib_plugin.quantization.float_grids import FLOAT_GRIDS
from lm_calib_plugin.quantization.grids import Grid, IntegerGrid, RealZeroGrid

_ALL: tuple[type[Grid], ...] = (IntegerGrid, RealZeroGrid, *FLOAT_GRIDS.values())
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in _ALL}
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def plain_grid(grid: Grid) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a grid as plain values and as tensors, both by the name of the field.

    Raises
    ------
    NotKeptError
        For a grid of another package.
    """
    if _KINDS.get(type(grid).__name__) is not type(grid):
        raise NotKeptError(f"grids of the kind {type(grid).__name__} are not known here")
    plain: dict[str, Any] = {"kind": type(grid).__name__}
    tensors: dict[str, Tensor] = {}
    for field in fields(grid):  # type: ignore[arg-type]
        value = getattr(grid, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value
        else:
            plain[field.name] = str(value) if isinstance(value, torch.dtype) else value
    return plain, tensors


def made_grid(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Grid:
    """Return the grid that :func:`plain_grid` took apart.

    Raises
    ------
    ValueError, KeyError, TypeError
        When the parts do not make a grid.
    """
    given: dict[str, Any] = {k: v for k, v in plain.items() if k != "kind"}
    if "dtype" in given:
        given["dtype"] = _DTYPES[given["dtype"]]
    found: Grid = _KINDS[plain["kind"]](**given, **tensors)
    return found
