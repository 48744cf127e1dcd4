"""Exact selection: how many weights go, and which ones when scores tie."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def as_typed(sparsity: float | Fraction) -> Fraction:
    """Return the decimal that was typed; an exact fraction is taken as it is.

    ``100 * 0.29`` is 28.999999999999996 in floating point; here it is 29.
    """
    return sparsity if isinstance(sparsity, Fraction) else Fraction(repr(float(sparsity)))


def removed_count(size: int, sparsity: float | Fraction) -> int:
    """Return ``floor(size * sparsity)`` with ``sparsity`` read as the decimal that was typed."""
    return math.floor(size * as_typed(sparsity))


def keep_highest(scores: Tensor, removed: int) -> Tensor:
    """Mark all but the ``removed`` lowest scores of every row.

    Among equal scores those with the lower index go first, so the count is exact.

    Parameters
    ----------
    scores
        ``[groups, size]``, finite; each row is one comparison group.
    removed
        Number of entries to remove from each row.

    Returns
    -------
    Boolean keep mask of the same shape.
    """
    if removed <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(removed, dim=1, keepdim=True).values
    below = scores < threshold
    tied = scores == threshold
    missing = removed - below.sum(dim=1, keepdim=True)
    goes = below | (tied & (tied.cumsum(dim=1) <= missing))
    return ~goes


def keep_by_threshold(scores: Tensor, sparsity: float) -> Tensor:
    """Mark what the papers' code keeps: everything above ``sorted[int(size * s)]`` of each row.

    At least one weight more than asked is removed, and all ties with it.
    """
    rank = min(int(scores.shape[1] * sparsity), scores.shape[1] - 1)
    threshold = scores.kthvalue(rank + 1, dim=1, keepdim=True).values
    return scores > threshold


def keep_n_of_m(scores: Tensor, keep: int, group: int) -> Tensor:
    """Mark the ``keep`` highest scores of every ``group`` consecutive inputs.

    Parameters
    ----------
    scores
        ``[out, in]`` with ``in`` divisible by ``group``.

    Returns
    -------
    Boolean keep mask ``[out, in]``; among equal scores those with the lower index go first.
    """
    rows = scores.reshape(-1, group)
    order = rows.argsort(dim=1, stable=True)
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask.scatter_(1, order[:, : group - keep], False)
    return mask.reshape(scores.shape)
