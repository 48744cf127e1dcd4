"""The sweep of optimal brain surgeon over the columns of one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_calib_plugin import kernels
from lm_calib_plugin.pruning.parts import BLOCK, Strength
from lm_calib_plugin.statistics import InverseFactor, LayerStats, gram_in, inverse_factor


def gram_factor(stats: LayerStats | None, damp: float, device: torch.device) -> InverseFactor:
    """Return the factor of the inverse of the damped Gram matrix of a layer's inputs."""
    return inverse_factor(gram_in(stats).to(device), damp)


def saliency(columns: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
    """Return ``W_ij^2 / U_jj^2`` of columns ``[in, out]``; zero for inputs without energy."""
    return (columns / diagonal[:, None]).square_().mul_(~dead[:, None])


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
    return sweep_together([weight], factor, strength, None if keep is None else [keep])[0]


def sweep_together(
    weights: Sequence[Tensor],
    factor: InverseFactor,
    strength: Strength,
    keeps: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Sweep over layers that share an input, as one matrix of all their rows.

    Every layer has a threshold of its own: results are those of :func:`sweep`, but for the last
    bits of products, which depend on the sizes of matrices.
    """
    # Transposed, so that a column of the weight is contiguous in memory.
    columns = torch.cat([weight.t() for weight in weights], dim=1)
    given = None if keeps is None else torch.cat([keep.t() for keep in keeps], dim=1)
    rows = [len(weight) for weight in weights]
    if strength.reference and given is None:
        columns[factor.dead] = 0.0
    width, block = len(columns), BLOCK
    if strength.n_of_m:
        # A block holds whole groups.
        block = max(1, BLOCK // strength.n_of_m[1]) * strength.n_of_m[1]
    mask = torch.empty_like(columns, dtype=torch.bool) if given is None else given
    for start in range(0, width, block):
        stop = min(start + block, width)
        own, upper = columns[start:stop], factor.upper[start:stop, start:stop]
        dead = factor.dead[start:stop]
        if given is None and strength.n_of_m:
            errors, mask[start:stop] = kernels.remove_n_of_m(own, upper, dead, strength.n_of_m)
        else:
            if given is None:
                mask[start:stop] = _kept(own, upper.diagonal(), dead, rows, strength)
            errors = kernels.remove(own, upper, mask[start:stop])
        columns[stop:].addmm_(factor.upper[start:stop, stop:].t(), errors, alpha=-1)
    parts = zip(columns.split(rows, dim=1), mask.split(rows, dim=1), strict=True)
    return [(swept.t().contiguous(), kept.t().contiguous()) for swept, kept in parts]


def _kept(
    block: Tensor, diagonal: Tensor, dead: Tensor, rows: list[int], strength: Strength
) -> Tensor:
    """Return the mask of a block ``[columns, rows of all layers]``, chosen layer by layer."""
    scores = saliency(block, diagonal, dead)
    # Transposed back: ties are broken by output row first, then by column.
    found = [strength.keep_all(part.t().contiguous()).t() for part in scores.split(rows, dim=1)]
    return torch.cat(found, dim=1)
