"""Weights that lie on a coarse grid already: de-quantized checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

# Groups of consecutive inputs that checkpoints share scales in; 0: a whole row.
GROUPS = (16, 32, 64, 128, 256, 0)
ROWS = 64
# A group has to have this many values a level, or repeated values would be expected by chance.
PER_LEVEL = 1.5
HIGHEST = 8
# From this width on, one number of the dtype in three may be a level at most.
CROWDED, LEFT_OUT = 6, 3


def coarse_bits(weight: Tensor) -> int | None:
    """Return the width of the grid on which a weight ``[out, in]`` lies already, or None.

    Up to 64 evenly spread rows are looked at. The width is the smallest ``b`` for which, with some
    usual group size, groups have more than ``1.5 * 2^b`` weights that are not zero on average, and
    no group holds more than ``2^b`` different values. Zeros do not count as weights, or pruned
    ones would seem to lie on a grid. Weights of a model that was never quantized differ nearly
    everywhere, also in bfloat16, unless they are few of a small range: a grid has to leave out
    most numbers that the dtype has in its range.
    """
    out, width = weight.shape
    rows = weight[torch.arange(min(ROWS, out)) * out // min(ROWS, out)].float()
    rows = rows[(rows != 0).any(dim=1)]
    found = []
    for size in GROUPS:
        size = size or width
        if width % size or not rows.numel():
            continue
        ordered = rows.reshape(-1, size).sort(dim=1).values
        different = (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1) + 1
        bits = max(1, (int(different.max()) - 1).bit_length())
        alive = float((ordered != 0).sum()) / len(ordered)
        if bits > HIGHEST or alive < PER_LEVEL * 2**bits:
            continue
        crowded = different * LEFT_OUT > _possible(ordered)
        if bits < CROWDED or float(crowded.float().mean()) < 0.5:
            found.append(bits)
    return min(found, default=None)


def _possible(groups: Tensor) -> Tensor:
    """Return how many numbers a dtype has in the range of each group ``[groups, size]``.

    The dtype is the shortest one that holds them all; both signs count.
    """
    places = groups.abs().contiguous().view(torch.int32)
    precision = next(bit for bit in range(24) if bit == 23 or bool((places >> bit & 1).any()))
    lowest = places.masked_fill(places == 0, torch.iinfo(torch.int32).max).amin(dim=1)
    return 2 * (((places.amax(dim=1) - lowest) >> precision) + 1)
