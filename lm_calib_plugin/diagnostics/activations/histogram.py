"""A signed histogram with bins on a logarithmic scale: quantiles of ``|x|``, shares in the tails.

2048 bins for every sign: each power of two from ``2^-34`` to ``2^30`` is split into 32 even bins,
so that no bin is wider than 1/32 of the values in it, and its middle is within 1/64 (1.6 %) of all
of them. Zero has a bin of its own; what is closer to zero, and what is larger, has one more each.
Counts are whole numbers, so their sums do not depend on an order.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

LOWEST, HIGHEST, SPLIT_BITS = -34, 30, 5
INNER = (HIGHEST - LOWEST) << SPLIT_BITS
# Zero, below the lowest edge, the inner ones, from the highest edge on.
BINS = INNER + 3
_SHIFT = 23 - SPLIT_BITS
_OFFSET = (LOWEST + 127) << SPLIT_BITS
# How far a quantile can be from the value it stands for, relative to that.
ERROR = 2.0 ** -(SPLIT_BITS + 1)


def counted(x: Tensor) -> Tensor:
    """Return how many values (float32, any shape) lie in each bin, ``[2, BINS]``, int64.

    The first row counts values that are not negative, the second the others.
    """
    size = x.abs().contiguous()
    # The bits of positive floats are in the order of the numbers.
    place = (size.view(torch.int32) >> _SHIFT) - _OFFSET
    place = place.clamp_(-1, INNER).add_(2).masked_fill_(size == 0, 0)
    place += (x < 0).int() * BINS
    return torch.bincount(place.reshape(-1), minlength=2 * BINS).reshape(2, BINS)


def edges() -> np.ndarray:
    """Return the ends of the bins of one sign, ``[BINS]``, without that of zero."""
    steps, split = np.arange(INNER), 2**SPLIT_BITS
    inner = np.exp2(steps // split + float(LOWEST)) * (1 + (steps % split) / split)
    return np.concatenate([[0.0], inner, [2.0**HIGHEST, math.inf]])


def quantile(counts: Tensor, share: float, largest: float) -> float | None:
    """Return the smallest ``|x|`` that at least this share of the values does not exceed.

    Within 1.6 % (see ``ERROR``) where it is at least ``2^-34``: the middle of the bin that holds
    it. Never more than ``largest``, the exact maximum; None without values.
    """
    both = counts.sum(0).cpu().numpy()
    total = int(both.sum())
    if not total:
        return None
    wanted = max(1, math.ceil(share * total - 1e-9))
    place = int(np.searchsorted(both.cumsum(), wanted))
    if place == 0:
        return 0.0
    low, high = edges()[place - 1 : place + 1]
    return float(min((low + min(high, max(low, largest))) / 2, largest))


def beyond(counts: Tensor, low: float, high: float, largest: float) -> tuple[float, float]:
    """Return the share of values below ``low`` or above ``high``, and how far it may be off.

    Exact but for the two bins that hold ``low`` and ``high``, in which values are taken to be
    spread evenly: at most the shares of these two bins.
    """
    tables = counts.cpu().numpy().astype(np.float64)
    total = tables.sum()
    if not total:
        return 0.0, 0.0
    ends = np.minimum(edges(), max(largest, 0.0))
    below_low, first = _above(tables[1], tables[0], ends, -low)
    above_high, second = _above(tables[0], tables[1], ends, high)
    return float((below_low + above_high) / total), float((first + second) / total)


def _above(
    own: np.ndarray, other: np.ndarray, ends: np.ndarray, bound: float
) -> tuple[float, float]:
    """Return how many values exceed a bound, and how many share its bin.

    ``own`` are the counts of values with the sign of the bound's side, ``other`` of the others.
    """
    if bound < 0:
        # All of this side, and of the other side those that are closer to zero.
        rest, doubt = _above(other, own, ends, -bound)
        return float(own.sum() + other.sum() - rest), doubt
    low, high = ends[:-1], ends[1:]
    inner = own[1:]
    full = inner[low >= bound].sum()
    held = np.flatnonzero((low < bound) & (bound < high))
    if not len(held):
        return float(full), 0.0
    place = held[0]
    part = (high[place] - bound) / (high[place] - low[place])
    return float(full + part * inner[place]), float(inner[place])


def densities(counts: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return middles of bins of ``|x|``, and the share of the values in each, per doubling.

    For drawing: bins are joined by eights; empty ones, zeros and what lies outside are left out.
    """
    both = counts.sum(0).cpu().numpy().astype(np.float64)
    joined = both[2:-1].reshape(-1, 8).sum(1) / max(1.0, both.sum())
    ends = edges()[1:-1]
    low, high = ends[:-1:8], ends[8::8]
    kept = joined > 0
    return np.sqrt(low * high)[kept], (joined / np.log2(high / low))[kept]
