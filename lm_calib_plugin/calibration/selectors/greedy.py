"""Greedy choices shared by selectors: set cover, and matching a mean."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import torch
from torch import Tensor


def greedy_cover(
    sets: Sequence[Collection[Hashable]],
    count: int,
    weights: Mapping[Hashable, float] | None = None,
    look_at: Callable[[list[int]], Collection[int]] = list,
) -> tuple[list[int], int]:
    """Pick sets one by one, each time the one that adds the most weight.

    A gain only falls while the cover grows, so an old gain is a bound and most sets need not be
    counted again (lazy greedy). When nothing is left to add, a new cover is begun with the sets
    that remain. Equal gains go to the earlier set.

    Parameters
    ----------
    weights
        Of the elements; None: all one.
    look_at
        Returns those of the remaining places that one step may pick from.

    Returns
    -------
    chosen
        ``count`` places in order of choice.
    covers
        How many covers were begun; 1 when the first was never complete.
    """

    def gain(place: int) -> float:
        new = [x for x in sets[place] if x not in covered]
        return float(len(new)) if weights is None else math.fsum(weights[x] for x in new)

    covered: set[Hashable] = set()
    bounds = {place: gain(place) for place in range(len(sets))}
    chosen: list[int] = []
    covers = 1
    while len(chosen) < count:
        best = _best(look_at(list(bounds)), bounds, gain)
        if bounds[best] <= 0 and covered:
            covered, covers = set(), covers + 1
            bounds = {place: gain(place) for place in bounds}
            best = _best(look_at(list(bounds)), bounds, gain)
        chosen.append(best)
        covered.update(sets[best])
        del bounds[best]
    return chosen, covers


def _best(places: Collection[int], bounds: dict[int, float], gain: Callable[[int], float]) -> int:
    """Return the place of largest gain, counting again only what may be the largest."""
    heap = [(-bounds[place], place) for place in places]
    heapq.heapify(heap)
    fresh: set[int] = set()
    while True:
        _, place = heap[0]
        if place in fresh:
            return place
        bounds[place] = gain(place)
        fresh.add(place)
        heapq.heapreplace(heap, (-bounds[place], place))


def match_mean(points: Tensor, target: Tensor, count: int) -> list[int]:
    """Pick points one by one so that their mean comes as near to ``target`` as one more can bring.

    Parameters
    ----------
    points
        ``[points, dimensions]`` float64.
    target
        ``[dimensions]`` float64.

    Returns
    -------
    list of int
        Places in order of choice; equal distances go to the earlier point.
    """
    points = points - target  # the mean shall come near to zero
    squares = points.square().sum(1)
    total = torch.zeros_like(target)
    free = torch.ones(len(points), dtype=torch.bool)
    chosen: list[int] = []
    for _ in range(count):
        # ||total + x||^2 less the part that is the same for every x
        distance = squares + 2 * (points @ total)
        best = int(distance.masked_fill(~free, torch.inf).argmin())
        chosen.append(best)
        free[best] = False
        total = total + points[best]
    return chosen
