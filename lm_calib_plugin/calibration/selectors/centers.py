"""``kcenter``: farthest first, so that no candidate is far from a chosen one.

The greedy rule of Gonzalez (1985) on the features of ``kmeans``; the largest distance left is at
most twice the smallest possible. The first is the candidate nearest to the mean of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.features import Features


class FarthestFirst(Selector):
    """Each step takes the candidate farthest from all that are chosen."""

    needs = frozenset({"means"})
    paper = "https://arxiv.org/abs/1708.00489"

    def select(
        self, candidates: Sequence[Tensor], count: int, features: Features, seed: int
    ) -> list[int]:
        """Go farthest first; equal distances go to the earlier candidate."""
        points = features.projected()
        chosen, radius = farthest_first(points, count)
        self.facts = {"radius": radius}
        return chosen


def farthest_first(points: Tensor, count: int) -> tuple[list[int], float]:
    """Return places in order of choice, and the largest distance to the nearest of them."""
    chosen = [int((points - points.mean(0)).square().sum(1).argmin())]
    nearest = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        free = nearest.clone()
        free[chosen] = -1
        chosen.append(int(free.argmax()))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return chosen, float(nearest.max().sqrt())
