"""Deal the calibration chunks out to processes, in the order of the set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from lm_calib_plugin.engine.batches import Chunk

# How much more than its part of the work a process may have before a chunk is cut in two.
UNEVEN = 0.05
# What second-order statistics cost beside two passes through a block.
GRAM = 0.25


@dataclass(frozen=True)
class Dealt:
    """The chunks of one process.

    ``before`` is how many tokens that count come before them, and ``total`` how many there are in
    all; both of the sequences used, and of those held out. ``tokens`` has those of each process,
    both kinds together.
    """

    chunks: list[Chunk]
    before: tuple[int, int]
    total: tuple[int, int]
    tokens: tuple[int, ...]


def whole(chunks: list[Chunk]) -> Dealt:
    """Return all chunks, for a process that is alone or does all of the work."""
    total = _counts(chunks)
    return Dealt(chunks, (0, 0), total, (sum(total),))


def deal(chunks: Sequence[Chunk], rank: int, count: int, second_order: bool = False) -> Dealt:
    """Return the part of one of ``count`` processes: neighbors in the order of the set.

    Chunks stay as they are where they can be dealt out evenly, to within 5 % of the work; else
    those that lie across a border are cut between two sequences. Together the processes see what
    one would see, in chunks that are the same but for those.

    Parameters
    ----------
    chunks
        All chunks, those held out last.
    rank, count
        Number of the process, and how many there are.
    second_order
        Whether the statistics of the sequences used cost much beside the passes themselves.
    """
    extra = GRAM if second_order else 0.0
    borders = _borders([_cost(chunk, extra) for chunk in chunks], count)
    if not _is_even([_cost(chunk, extra) for chunk in chunks], borders):
        chunks, borders = _cut(chunks, count, extra)
    ranges = [chunks[a:b] for a, b in pairwise(borders)]
    return Dealt(
        list(ranges[rank]),
        _counts(chunks[: borders[rank]]),
        _counts(chunks),
        tuple(sum(_counts(part)) for part in ranges),
    )


def _cut(chunks: Sequence[Chunk], count: int, extra: float) -> tuple[list[Chunk], list[int]]:
    """Return the chunks, cut where the parts of even work end, and the borders between parts."""
    costs = [_cost(chunk, extra) / chunk.rows for chunk in chunks for _ in range(chunk.rows)]
    wanted = _borders(costs, count)
    made: list[Chunk] = []
    borders, start = [0] * len(wanted), 0
    for chunk in chunks:
        inside = sorted({b - start for b in wanted if start < b < start + chunk.rows})
        edges = [0, *inside, chunk.rows]
        for first, last in pairwise(edges):
            made.append(chunk if not inside else chunk.part(slice(first, last)))
            for number, border in enumerate(wanted):
                if border == start + last:
                    borders[number] = len(made)
        start += chunk.rows
    return made, borders


def _borders(costs: Sequence[float], count: int) -> list[int]:
    """Return where ``count`` ranges of neighbors of nearly even cost begin and end.

    Each border is the one nearest to where it should be. The first range is never empty.
    """
    sums = [0.0, *accumulate(costs)]
    borders, place = [0], min(1, len(costs))
    for number in range(1, count):
        ideal = sums[-1] * number / count
        while place < len(costs) and abs(sums[place + 1] - ideal) < abs(sums[place] - ideal):
            place += 1
        borders.append(place)
    return [*borders, len(costs)]


def _is_even(costs: Sequence[float], borders: Sequence[int]) -> bool:
    loads = [sum(costs[a:b]) for a, b in pairwise(borders)]
    return max(loads) <= (1 + UNEVEN) * sum(loads) / len(loads)


def _cost(chunk: Chunk, extra: float) -> float:
    """Return what the passes of a chunk cost: pads are computed as tokens are."""
    return float(chunk.ids.numel()) * (1.0 if chunk.heldout else 1.0 + extra)


def _counts(chunks: Sequence[Chunk]) -> tuple[int, int]:
    """Return how many tokens count, of the sequences used and of those held out."""
    used, held = (sum(c.tokens for c in chunks if c.heldout == flag) for flag in (False, True))
    return used, held
