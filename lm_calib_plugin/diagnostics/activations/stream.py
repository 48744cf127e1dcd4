"""Massive activations of the residual stream (Sun et al., arXiv 2402.17762).

A value ``h`` counts as massive when ``|h| > 100`` and ``|h|`` exceeds 1000 times the median of
``|h|`` over the channels of its token, in the hidden states before a block (level 0 is what goes
into the first block, the last level what comes out of the last one). The median is the lower one
of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_calib_plugin.diagnostics.activations.seen import middle
from lm_calib_plugin.engine.batches import Chunk

SIZE, TIMES = 100.0, 1000.0
# Kept of each level, of first tokens and of all others.
KEPT = 8


@dataclass(frozen=True, order=True)
class Massive:
    """One massive activation, by size.

    ``level`` is the number of the block that it goes into, ``sequence`` and ``position`` tell the
    token, ``token`` is its id, ``times`` its size over the median of its token.
    """

    size: float
    value: float
    times: float
    level: int
    channel: int
    sequence: int
    position: int
    token: int


class Stream:
    """What is kept of the residual stream; its size does not depend on the number of tokens.

    ``counts`` ``[2, levels, hidden]``: massive activations of first tokens and of all others, by
    channel. ``peaks`` ``[2, levels]``: largest ``|h|``. ``medians`` ``[2, levels, 2]``: sum over
    tokens of the median of ``|h|``, and their number. ``kept``: the largest few massive ones of
    each level. ``top``: the largest value of each level, massive or not.
    """

    def __init__(self, levels: int, hidden: int) -> None:
        self.counts = torch.zeros(2, levels, hidden, dtype=torch.int64)
        self.peaks = torch.zeros(2, levels)
        self.medians = torch.zeros(2, levels, 2, dtype=torch.float64)
        self.kept: dict[tuple[int, int], list[Massive]] = {}
        self.top: dict[int, Massive] = {}

    def update(self, level: int, chunk: Chunk) -> None:
        """Look at the hidden states of a chunk; pads do not count."""
        assert chunk.hidden is not None
        rows = chunk.hidden.detach().reshape(-1, chunk.hidden.shape[-1])
        places = torch.arange(len(rows))
        counted = chunk.counted()
        if counted is not None:
            rows, places = rows[counted.to(rows.device)], places[counted]
        size = rows.float().abs()
        median = middle(size)
        first = (places % chunk.ids.shape[1] == 0).to(rows.device)
        heavy = (size > SIZE) & (size > TIMES * median[:, None])
        found = []
        for which in (first, ~first):
            own = heavy & which[:, None]
            largest = torch.where(which, size.amax(1), 0.0).max() if len(size) else torch.zeros(())
            medians = torch.where(which, median, 0.0).sum(dtype=torch.float64)
            massive = []
            if bool(own.any()):
                massive = _largest(level, chunk, rows, torch.where(own, size, 0.0), median, places)
            numbers = torch.tensor([float(medians), int(which.sum())], dtype=torch.float64)
            found.append((own.sum(0).cpu(), largest.cpu(), numbers, massive))
        top = _largest(level, chunk, rows, size, median, places, 1)
        # From here on nothing asks for memory: all of a chunk counts, or nothing.
        for part, (count, largest, numbers, massive) in enumerate(found):
            self.counts[part, level] += count
            self.peaks[part, level] = torch.maximum(self.peaks[part, level], largest)
            self.medians[part, level] += numbers
            self._keep(part, level, massive)

        self.top[level] = max([*top, *([self.top[level]] if level in self.top else [])])

    def _keep(self, part: int, level: int, found: Sequence[Massive]) -> None:
        both = [*self.kept.get((part, level), ()), *found]
        self.kept[part, level] = sorted(both, reverse=True)[:KEPT]

    def count(self, first: bool = True) -> int:
        """Return how many there are, on all levels; without ``first``, not at first tokens."""
        return int(self.counts.sum() if first else self.counts[1].sum())

    def largest(self, first: bool = True) -> list[Massive]:
        """Return the largest that were kept, of all levels."""
        parts = [m for (part, _), kept in self.kept.items() if first or part for m in kept]
        return sorted(parts, reverse=True)

    def peak(self, level: int, first: bool = True) -> float:
        """Return the largest ``|h|`` of a level."""
        return float(self.peaks[:, level].max() if first else self.peaks[1, level])

    def median(self, level: int) -> float | None:
        """Return the mean over tokens of the median of ``|h|``; None without tokens."""
        total, count = self.medians[:, level].sum(0).tolist()
        return total / count if count else None


def _largest(
    level: int,
    chunk: Chunk,
    rows: Tensor,
    size: Tensor,
    median: Tensor,
    places: Tensor,
    count: int = KEPT,
) -> list[Massive]:
    """Return the largest values of ``size`` ``[tokens, hidden]``, but for zeros where many."""
    flat, made = size.reshape(-1), []
    if count == 1:
        index = flat.argmax()[None]
        best = flat[index]
    else:
        best, index = flat.topk(min(count, flat.numel()))
    for value, place in zip(best.tolist(), index.tolist(), strict=True):
        if value <= 0 and count > 1:
            break
        row, channel = divmod(place, size.shape[1])
        sequence, position = divmod(int(places[row]), chunk.ids.shape[1])
        made.append(
            Massive(
                value,
                float(rows[row, channel]),
                value / max(float(median[row]), 1e-30),
                level,
                channel,
                chunk.numbers[sequence],
                position,
                int(chunk.ids[sequence, position]),
            )
        )
    return made
