"""The sweep of optimal brain surgeon over the columns of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_calib_plugin.pruning.masks import keep_n_of_m
from lm_calib_plugin.pruning.parts import BLOCK, Strength
from lm_calib_plugin.statistics import InverseFactor, LayerStats, gram_in, inverse_factor


def gram_factor(stats: LayerStats | None, damp: float, device: torch.device) -> InverseFactor:
    """Return the factor of the inverse of the damped Gram matrix of a layer's inputs."""
    return inverse_factor(gram_in(stats).to(device), damp)


def saliency(columns: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
    """Return ``W_ij^2 / U_jj^2`` of columns ``[in, out]``; zero for inputs without energy."""
    return (columns / diagonal[:, None]).square().masked_fill(dead[:, None], 0.0)


def sweep(
    weight: Tensor, factor: InverseFactor, strength: Strength, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Remove weights from left to right; spread each error over the columns to the right.

    For every 128 columns the mask is chosen from the weights as already updated, by their
    saliency over all rows (for N:M at every M-th column, within each group of a row).

    Parameters
    ----------
    weight
        ``[out, in]``, float32; not changed.
    factor
        Of the inverse of the damped Gram matrix.
    strength
        How much is removed.
    keep
        A mask ``[out, in]`` to follow instead of choosing one.

    Returns
    -------
    The updated weight and its mask, both ``[out, in]``.
    """
    # Transposed, so that a column of the weight is contiguous in memory.
    columns = weight.t().contiguous()
    if columns.data_ptr() == weight.data_ptr():
        columns = columns.clone()
    given = None if keep is None else keep.t()
    if strength.reference and given is None:
        columns[factor.dead] = 0.0
    width = columns.shape[0]
    block = BLOCK
    if strength.n_of_m:
        # A block holds whole groups.
        block = max(1, BLOCK // strength.n_of_m[1]) * strength.n_of_m[1]
    masks = []
    for start in range(0, width, block):
        stop = min(start + block, width)
        own = None if given is None else given[start:stop]
        errors, mask = _sweep_block(columns[start:stop], factor, start, strength, own)
        columns[stop:] -= factor.upper[start:stop, stop:].t() @ errors
        masks.append(mask)
    return columns.t().contiguous(), torch.cat(masks).t().contiguous()


def _sweep_block(
    block: Tensor, factor: InverseFactor, start: int, strength: Strength, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Prune ``block`` (``[columns, out]``) in place; return scaled errors and mask, same shape."""
    stop = start + block.shape[0]
    upper = factor.upper[start:stop, start:stop]
    diagonal, dead = upper.diagonal(), factor.dead[start:stop]
    group = strength.n_of_m[1] if strength.n_of_m and given is None else 0
    if given is not None:
        keep = given
    elif group:
        keep = torch.ones_like(block, dtype=torch.bool)
    else:
        # Transposed back: ties are broken by output row first, then by column.
        scores = saliency(block, diagonal, dead).t().contiguous()
        keep = strength.keep_all(scores).t().contiguous()
    errors = torch.zeros_like(block)
    for i in range(block.shape[0]):
        if group and i % group == 0:
            own = slice(i, i + group)
            scores = saliency(block[own], diagonal[own], dead[own])
            keep[own] = keep_n_of_m(scores.t(), *strength.n_of_m).t()  # type: ignore[misc]
        column = block[i]
        errors[i] = column.masked_fill(keep[i], 0.0) / diagonal[i]
        block[i + 1 :] -= torch.outer(upper[i, i + 1 :], errors[i])
        column.masked_fill_(~keep[i], 0.0)
    return errors, keep
