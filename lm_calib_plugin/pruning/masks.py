"""Exact selection: how many weights go, and which ones when scores tie."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

# On a device, rows of so many numbers are worth more than the one group of threads that
# `kthvalue` gives to a row; `topk` gives several to each.
LONG = 1 << 17


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
    threshold = ranked(scores, removed)
    keep = scores > threshold
    if scores.is_cpu and int(keep.count_nonzero()) == scores.numel() - removed * len(scores):
        return keep  # nothing tied at the threshold; a device is not waited for
    below = scores < threshold
    tied = scores == threshold
    missing = removed - below.sum(dim=1, keepdim=True)
    goes = below | (tied & (tied.cumsum(dim=1) <= missing))
    return ~goes


def ranked(scores: Tensor, rank: int) -> Tensor:
    """Return the ``rank``-th smallest number of every row, ``[groups, 1]``.

    On a CPU by the partial sort of numpy, which takes a third of the time of
    :meth:`~torch.Tensor.kthvalue` and gives the same numbers.

    Parameters
    ----------
    scores
        ``[groups, size]``, no NaN.
    rank
        From 1 to the size of a row.
    """
    if not scores.is_cpu and scores.shape[1] >= LONG:
        return by_topk(scores, rank)
    if not scores.is_cpu or scores.dtype not in (torch.float32, torch.float64):
        return scores.kthvalue(rank, dim=1, keepdim=True).values
    # A copy to be sorted; the sum makes a zero of a negative zero.
    rows = (scores.detach() + 0.0).contiguous()
    if rows.dtype == torch.float32 and rows.numel() and bool(rows.amin() >= 0):
        # Integers of the same bits have the order of non-negative numbers, and sort faster.
        return _partitioned(rows.view(torch.int32), rank).view(torch.float32)
    return _partitioned(rows, rank)


def by_topk(scores: Tensor, rank: int) -> Tensor:
    """Return what :func:`ranked` does, from the unsorted lowest or highest numbers of each row."""
    above = scores.shape[1] - rank + 1
    if rank <= above:
        lowest = scores.topk(rank, dim=1, largest=False, sorted=False).values
        return lowest.amax(dim=1, keepdim=True)
    return scores.topk(above, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def _partitioned(rows: Tensor, rank: int) -> Tensor:
    """Return the ``rank``-th smallest entry of every row, and leave rows in disorder."""
    # In one thread: others would compete with those of torch, which wait for work by spinning.
    rows.numpy().partition(rank - 1, axis=1)
    return rows[:, rank - 1 : rank].clone()


def keep_by_threshold(scores: Tensor, sparsity: float) -> Tensor:
    """Mark what the papers' code keeps: everything above ``sorted[int(size * s)]`` of each row.

    At least one weight more than asked is removed, and all ties with it.
    """
    rank = min(int(scores.shape[1] * sparsity), scores.shape[1] - 1)
    threshold = ranked(scores, rank + 1)
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
