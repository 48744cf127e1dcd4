"""One block of a sweep: what a column loses is spread over the columns after it.

All matrices are transposed, ``[columns, rows]``, so that a column of the weight is contiguous.
With ``U`` the block of the upper factor of the inverse of the Gram matrix, ``inv(G) = U^T U``,
column ``i`` of every row is ``w_i = W_i - sum_(k<i) U_ki e_k`` when its turn comes; it becomes
``w'_i``, and its error is ``e_i = (w_i - w'_i) / U_ii`` (optimal brain surgeon; arXiv 2301.00774,
algorithm 1). The columns behind the block are left to the caller:
``W_rest -= U[block, rest]^T E``, one product.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns after which the rest of a block is brought up to date by one product.
INNER = 32
# The largest block that a compiled kernel holds in registers.
WIDEST = 128


@dataclass(frozen=True)
class Levels:
    """Integer levels of the columns of a block: ``scale * (q - zero)``, lowest to highest ``q``.

    ``scale`` and ``zero`` are ``[groups, rows]``, ``group`` is the group of each column of the
    block, ``[columns]``, on the device of the weight.
    """

    scale: Tensor
    zero: Tensor
    group: Tensor
    lowest: int
    highest: int


def compiled_on(tensor: Tensor) -> bool:
    """Tell whether sweeps over a tensor run in compiled kernels: on CUDA, where triton is there."""
    here = tensor.is_cuda and torch.version.hip is None and tensor.dtype == torch.float32
    return here and importlib.util.find_spec("triton") is not None


def remove(block: Tensor, upper: Tensor, keep: Tensor, compiled: bool | None = None) -> Tensor:
    """Remove the weights off a mask from left to right.

    Parameters
    ----------
    block
        ``[columns, rows]``, float32; becomes the block after the sweep, zero off the mask.
    upper
        ``U`` of the block, ``[columns, columns]``.
    keep
        The mask, ``[columns, rows]``, bool.
    compiled
        Whether the kernel runs; None: as :func:`compiled_on` says.

    Returns
    -------
    The errors ``E``, ``[columns, rows]``.
    """
    if _compiled(block, compiled):
        from lm_calib_plugin.kernels import compiled as kernels

        return kernels.remove(block, upper, keep)
    share = (~keep) / upper.diagonal()[:, None]

    def settle(i: int, column: Tensor, error: Tensor) -> None:
        torch.mul(column, share[i], out=error)

    errors = _sweep(block, upper, settle)
    _zero_off(block, keep)
    return errors


def remove_n_of_m(
    block: Tensor,
    upper: Tensor,
    dead: Tensor,
    n_of_m: tuple[int, int],
    compiled: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep N of every M columns in each row, chosen at every M-th column from what it then holds.

    Lowest ``w_i^2 / U_ii^2`` go; among equal ones those with the lower index.

    Parameters
    ----------
    block, upper, compiled
        As for :func:`remove`; whole groups.
    dead
        Columns without energy, ``[columns]``, bool; their saliency is zero.
    n_of_m
        ``(N, M)``.

    Returns
    -------
    Errors and mask, ``[columns, rows]``.
    """
    if _compiled(block, compiled):
        from lm_calib_plugin.kernels import compiled as kernels

        return kernels.remove_n_of_m(block, upper, dead, n_of_m)
    count, group = n_of_m
    diagonal = upper.diagonal()
    keep = torch.ones_like(block, dtype=torch.bool)
    share = torch.empty_like(block)

    def settle(i: int, column: Tensor, error: Tensor) -> None:
        if i % group == 0:
            own = slice(i, i + group)
            scores = (block[own] / diagonal[own, None]).square_().mul_(~dead[own, None])
            order = scores.t().argsort(dim=1, stable=True)
            mask = torch.ones_like(order, dtype=torch.bool)
            mask.scatter_(1, order[:, : group - count], False)
            keep[own] = mask.t()
            share[own] = ~keep[own] / diagonal[own, None]
        torch.mul(column, share[i], out=error)

    errors = _sweep(block, upper, settle, max(1, INNER // group) * group)
    _zero_off(block, keep)
    return errors, keep


def round_integers(
    block: Tensor,
    upper: Tensor,
    levels: Levels,
    keep: Tensor | None = None,
    compiled: bool | None = None,
) -> Tensor:
    """Round columns to integer levels from left to right.

    Parameters
    ----------
    block, upper, compiled
        As for :func:`remove`; the block becomes the rounded one.
    levels
        The levels of every column.
    keep
        A mask ``[columns, rows]`` off which weights become zero; None: none does.

    Returns
    -------
    The errors ``E``, ``[columns, rows]``.
    """
    if _compiled(block, compiled):
        from lm_calib_plugin.kernels import compiled as kernels

        return kernels.round_integers(block, upper, levels, keep)
    scale = levels.scale
    # Rounded before the zero point is added: both are whole numbers, so that nothing changes.
    low, high = levels.lowest - levels.zero, levels.highest - levels.zero
    groups = levels.group.tolist()

    def rounded(i: int, column: Tensor) -> Tensor:
        group = groups[i]
        found = torch.div(column, scale[group]).round_()
        return found.clamp_(low[group], high[group]).mul_(scale[group])

    return round_with(block, upper, rounded, keep)


def round_with(
    block: Tensor,
    upper: Tensor,
    rounded: Callable[[int, Tensor], Tensor],
    keep: Tensor | None = None,
) -> Tensor:
    """Round columns from left to right; ``rounded(i, column)`` is column ``i`` on its levels.

    The rest as for :func:`round_integers`; there is no compiled kernel.
    """
    diagonal = upper.diagonal().tolist()

    def settle(i: int, column: Tensor, error: Tensor) -> None:
        found = rounded(i, column)
        if keep is not None:
            found = found * keep[i]
        torch.sub(column, found, out=error).div_(diagonal[i])
        column.copy_(found)

    return _sweep(block, upper, settle)


def _compiled(block: Tensor, asked: bool | None) -> bool:
    return len(block) <= WIDEST and (compiled_on(block) if asked is None else asked)


def _sweep(
    block: Tensor,
    upper: Tensor,
    settle: Callable[[int, Tensor, Tensor], None],
    inner: int = INNER,
) -> Tensor:
    """Call ``settle(i, column, error)`` for each column in turn, and spread the error it writes.

    In two levels: within ``inner`` columns at once, over the rest of the block by products.
    """
    columns = len(block)
    errors = torch.empty_like(block)
    for first in range(0, columns, inner):
        last = min(first + inner, columns)
        for i in range(first, last):
            settle(i, block[i], errors[i])
            if i + 1 < last:
                block[i + 1 : last].addr_(upper[i, i + 1 : last], errors[i], alpha=-1)
        if last < columns:
            block[last:].addmm_(upper[first:last, last:].t(), errors[first:last], alpha=-1)
    return errors


def _zero_off(block: Tensor, keep: Tensor) -> None:
    """Set a block to zero off a mask; the sum makes zeros of negative zeros."""
    block.mul_(keep).add_(0.0)
