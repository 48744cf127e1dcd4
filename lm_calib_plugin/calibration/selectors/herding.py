"""``herding``: the mean of the chosen follows the mean of the pool (Welling, ICML 2009)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.features import Features
from lm_calib_plugin.calibration.selectors.greedy import match_mean


class Herding(Selector):
    """Each step takes the candidate that brings the mean nearest, on the features of kmeans."""

    needs = frozenset({"means"})
    paper = "https://arxiv.org/abs/1203.3472"

    def select(
        self, candidates: Sequence[Tensor], count: int, features: Features, seed: int
    ) -> list[int]:
        """Match the mean of the pool; nothing is drawn."""
        points = features.projected()
        chosen = match_mean(points, points.mean(0), count)
        left = points[chosen].mean(0) - points.mean(0)
        self.facts = {"distance_of_means": float(left.norm())}
        return chosen
