"""From weights and inputs to levels and scales, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_calib_plugin.execution.facts import Activation
from lm_calib_plugin.quantization.grids import Grid
from lm_calib_plugin.quantization.numbers import FP8_MAX, round_e2m1

TINY = torch.finfo(torch.float32).smallest_normal


class UnpackableError(ValueError):
    """The weights are not what the kernel stores exactly."""


def integer_levels(weight: Tensor, grid: Grid) -> Tensor:
    """Return the integer levels ``[out, in]`` (int32) of weights that lie on a grid.

    ``weight = scale * (level - zero)``, rounded to its dtype.

    Raises
    ------
    UnpackableError
        If a weight is not a level.
    """
    scale, zero, groups = _grouped(weight, grid)
    level = (groups / scale).add_(zero).round_()
    _check(weight, (level - zero) * scale)
    return level.reshape(weight.shape).to(torch.int32)


def fp8_levels(weight: Tensor, grid: Grid) -> Tensor:
    """Return the e4m3 levels ``[out, in]`` of weights that lie on a grid ``scale * e4m3``.

    Raises
    ------
    UnpackableError
        If a weight is not a level.
    """
    scale, _, groups = _grouped(weight, grid)
    level = (groups / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    _check(weight, level.float() * scale)
    return level.reshape(weight.shape)


def fp4_levels(weight: Tensor, grid: Grid) -> Tensor:
    """Return the e2m1 values ``[out, in]`` (float32) of weights on a grid ``scale * e2m1``.

    Raises
    ------
    UnpackableError
        If a weight is not a level.
    """
    scale, _, groups = _grouped(weight, grid)
    level = round_e2m1(groups / scale)
    _check(weight, level * scale)
    return level.reshape(weight.shape)


def _grouped(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    scale = grid.scale.to(weight.device)[..., None]
    found = getattr(grid, "zero", None)
    zero = torch.zeros_like(scale) if found is None else found.to(weight.device)[..., None]
    groups = weight.detach().float().reshape(weight.shape[0], scale.shape[1], -1)
    return scale, zero, groups


def _check(weight: Tensor, again: Tensor) -> None:
    off = int((again.reshape(weight.shape).to(weight.dtype) != weight).sum())
    if off:
        raise UnpackableError(f"{off} of {weight.numel()} weights are not levels of the grid")


def quantize_rows(rows: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Quantize input rows to the levels and scales of ``ActivationSpec``.

    Parameters
    ----------
    rows
        ``[tokens, in]``, any floating point dtype.
    activation
        The levels. Per token the scale is ``amax / (2^(bits-1) - 0.5)``, or ``amax / 448``; a row
        of zeros gets the scale 1.

    Returns
    -------
    levels
        ``[tokens, in]``, int8 or float8_e4m3fn.
    scale
        ``[tokens, 1]``, float32.
    """
    static = static_scale(activation, rows.device)
    if activation.number == "fp8":
        return fp8_rows(rows, static)
    return integer_rows(rows, 2.0 ** (activation.bits - 1), static)


def static_scale(activation: Activation, device: torch.device) -> Tensor | None:
    """Return the static scale as ``[1, 1]``, float32; None where scales are dynamic."""
    if activation.scale is None:
        return None
    return torch.full((1, 1), activation.scale, dtype=torch.float32, device=device)


def fp8_rows(rows: Tensor, static: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize rows to e4m3, by a static scale ``[1, 1]`` or by one per row."""
    scale = _row_scale(rows, FP8_MAX) if static is None else static.expand(rows.shape[0], 1)
    place = (rows.float() / scale).clamp(-FP8_MAX, FP8_MAX)
    return place.to(torch.float8_e4m3fn), scale.contiguous()


def integer_rows(
    rows: Tensor, bound: Tensor | float, static: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Quantize rows to integers from ``-bound`` to ``bound - 1``; int8.

    ``static`` is a scale ``[1, 1]``, or None: one per row. Where the function is compiled, both are
    tensors, so that it is compiled once for all layers and not for each scale.
    """
    scale = _row_scale(rows, bound - 0.5) if static is None else static.expand(rows.shape[0], 1)
    place = (rows.float() / scale).round_()
    return place.clamp_(min=-bound, max=bound - 1).to(torch.int8), scale.contiguous()


def _row_scale(rows: Tensor, reach: Tensor | float) -> Tensor:
    amax = rows.abs().amax(dim=1, keepdim=True).float()
    scale = (amax / reach).clamp(min=TINY)
    return torch.where(amax > 0, scale, torch.ones_like(scale))


def simulate_rows(rows: Tensor, activation: Activation | None) -> Tensor:
    """Return the values that input rows ``[tokens, in]`` have after quantization, same dtype."""
    if activation is None:
        return rows
    levels, scale = quantize_rows(rows, activation)
    return (levels.float() * scale).to(rows.dtype)


def exact_two_four(weight: Tensor) -> bool:
    """Tell whether at most two of every four consecutive weights of a row are not zero."""
    rows, width = weight.shape
    if width % 4:
        return False
    kept = (weight.reshape(rows, width // 4, 4) != 0).sum(dim=-1)
    return bool((kept <= 2).all())
