"""The sweeps of :mod:`~lm_calib_plugin.kernels.sweeps` in triton.

A program owns a tile of rows. It holds the errors of all columns of the block in registers, and
visits the columns in order: column ``i`` is what memory holds minus ``sum_k U_ki e_k``, one
reduction over the tile. Nothing is read that another thread of the program may have written:
results go to memory of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_calib_plugin.kernels.sweeps import Levels

# Adding and taking away 1.5 * 2^23 rounds a float32 to the nearest integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _present(block, factor, errors, i, rows, inside, stride, width, SIZE: tl.constexpr):
    """Return column ``i`` of a tile as the columns before it have left it."""
    before = tl.arange(0, SIZE)
    upper = tl.load(factor + i * width + before, mask=before < i, other=0.0)
    column = tl.load(block + i * stride + rows, mask=inside, other=0.0)
    return column - tl.sum(upper[:, None] * errors, axis=0)


@triton.jit
def _remove(
    block, factor, keep, found, out, height, stride, width, SIZE: tl.constexpr, TILE: tl.constexpr
):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = rows < height
    places = tl.arange(0, SIZE)
    errors = tl.zeros((SIZE, TILE), dtype=tl.float32)
    for i in range(width):
        column = _present(block, factor, errors, i, rows, inside, stride, width, SIZE)
        stays = tl.load(keep + i * height + rows, mask=inside, other=1) != 0
        error = tl.where(stays, 0.0, tl.div_rn(column, tl.load(factor + i * width + i)))
        errors = tl.where(places[:, None] == i, error[None, :], errors)
        tl.store(out + i * height + rows, error, mask=inside)
        tl.store(
            found + i * height + rows, tl.where(stays, column, column * 0.0) + 0.0, mask=inside
        )


@triton.jit
def _remove_n_of_m(
    block,
    factor,
    dead,
    keep,
    found,
    out,
    height,
    stride,
    width,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    HOLD: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = rows < height
    places = tl.arange(0, SIZE)
    own = tl.arange(0, HOLD)
    errors = tl.zeros((SIZE, TILE), dtype=tl.float32)
    for start in range(0, width, GROUP):
        scores = tl.zeros((HOLD, TILE), dtype=tl.float32)
        for j in range(GROUP):
            i = start + j
            column = _present(block, factor, errors, i, rows, inside, stride, width, SIZE)
            root = tl.div_rn(column, tl.load(factor + i * width + i))
            score = tl.where(tl.load(dead + i) != 0, 0.0, root * root)
            scores = tl.where(own[:, None] == j, score[None, :], scores)
        for j in range(GROUP):
            i = start + j
            score = tl.sum(tl.where(own[:, None] == j, scores, 0.0), axis=0)
            # Ties go by index, so that exactly so many columns come first.
            first = (scores < score[None, :]) | ((scores == score[None, :]) & (own < j)[:, None])
            rank = tl.sum((first & (own < GROUP)[:, None]).to(tl.int32), axis=0)
            stays = rank >= GROUP - COUNT
            column = _present(block, factor, errors, i, rows, inside, stride, width, SIZE)
            error = tl.where(stays, 0.0, tl.div_rn(column, tl.load(factor + i * width + i)))
            errors = tl.where(places[:, None] == i, error[None, :], errors)
            tl.store(out + i * height + rows, error, mask=inside)
            tl.store(keep + i * height + rows, stays.to(tl.int8), mask=inside)
            tl.store(
                found + i * height + rows, tl.where(stays, column, column * 0.0) + 0.0, mask=inside
            )


@triton.jit
def _round_integers(
    block,
    factor,
    scales,
    zeros,
    groups,
    keep,
    result,
    out,
    height,
    stride,
    width,
    lowest,
    highest,
    MASKED: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = rows < height
    places = tl.arange(0, SIZE)
    errors = tl.zeros((SIZE, TILE), dtype=tl.float32)
    for i in range(width):
        column = _present(block, factor, errors, i, rows, inside, stride, width, SIZE)
        group = tl.load(groups + i)
        scale = tl.load(scales + group * height + rows, mask=inside, other=1.0)
        zero = tl.load(zeros + group * height + rows, mask=inside, other=0.0)
        exact = tl.div_rn(column, scale)
        # The bounds are whole numbers: clamping first gives the same, and keeps numbers small.
        level = tl.minimum(tl.maximum(exact, lowest - zero), highest - zero)
        # What is no number has to be seen by whoever checks the result; clamping loses it.
        found = tl.where(exact == exact, ((level + ROUNDER) - ROUNDER) * scale, exact)
        if MASKED:
            stays = tl.load(keep + i * height + rows, mask=inside, other=1) != 0
            found = tl.where(stays, found, found * 0.0) + 0.0
        error = tl.div_rn(column - found, tl.load(factor + i * width + i))
        errors = tl.where(places[:, None] == i, error[None, :], errors)
        tl.store(out + i * height + rows, error, mask=inside)
        tl.store(result + i * height + rows, found, mask=inside)


def remove(block: Tensor, upper: Tensor, keep: Tensor) -> Tensor:
    """See :func:`lm_calib_plugin.kernels.sweeps.remove`."""
    found, errors, shape = _prepared(block, upper)
    _launch(_remove, block, upper.t().contiguous(), _bytes(keep), found, errors, **shape)
    block.copy_(found)
    return errors


def remove_n_of_m(
    block: Tensor, upper: Tensor, dead: Tensor, n_of_m: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """See :func:`lm_calib_plugin.kernels.sweeps.remove_n_of_m`."""
    found, errors, shape = _prepared(block, upper)
    keep = torch.empty(block.shape, dtype=torch.int8, device=block.device)
    count, group = n_of_m
    hold = {"COUNT": count, "GROUP": group, "HOLD": triton.next_power_of_2(group)}
    factor = upper.t().contiguous()
    _launch(_remove_n_of_m, block, factor, _bytes(dead), keep, found, errors, **shape, **hold)
    block.copy_(found)
    return errors, keep.bool()


def round_integers(block: Tensor, upper: Tensor, levels: Levels, keep: Tensor | None) -> Tensor:
    """See :func:`lm_calib_plugin.kernels.sweeps.round_integers`."""
    found, errors, shape = _prepared(block, upper)
    _launch(
        _round_integers,
        block,
        upper.t().contiguous(),
        levels.scale.contiguous(),
        levels.zero.contiguous(),
        levels.group.to(torch.int32),
        errors if keep is None else _bytes(keep),
        found,
        errors,
        **shape,
        lowest=float(levels.lowest),
        highest=float(levels.highest),
        MASKED=keep is not None,
    )
    block.copy_(found)
    return errors


def _prepared(block: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return room for result and errors, and the arguments that say how large all is."""
    width, height = block.shape
    if block.stride(1) != 1 or block.dtype != torch.float32 or upper.dtype != torch.float32:
        raise ValueError("a block [columns, rows] of contiguous columns in float32 is needed")
    # Small layers are spread over more programs.
    tile = 32 if height >= 4096 else 16
    sizes = {"height": height, "stride": block.stride(0), "width": width}
    found, errors = torch.empty(2, width, height, dtype=block.dtype, device=block.device)
    return found, errors, {**sizes, "SIZE": max(16, triton.next_power_of_2(width)), "TILE": tile}


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.int8)


def _launch(kernel: Any, *tensors: Tensor, height: int, TILE: int, **rest: Any) -> None:
    grid = (triton.cdiv(height, TILE),)
    # Triton launches on the current device, which need not be that of the tensors.
    device = tensors[0].device
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](*tensors, height=height, TILE=TILE, num_warps=4, **rest)
