"""``centroid``: activations as near as possible to those of target sequences.

Minimized is the sum over blocks of the squared distance between the mean block output of the
chosen and that of the target, divided by the variance of the pool in that block (ACDM; the mean of
a sequence leaves out pads and first token). Greedy, one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.features import Features
from lm_calib_plugin.calibration.selectors.greedy import match_mean


class Centroid(Selector):
    """Each step takes the candidate that brings the mean nearest to the target's."""

    needs = frozenset({"means"})
    takes_target = True
    paper = "https://openreview.net/forum?id=pfw3saHzGU"

    def select(
        self, candidates: Sequence[Tensor], count: int, features: Features, seed: int
    ) -> list[int]:
        """Scale each block by its spread, then match the mean of the target."""
        scaled, aims = [], []
        for pool, target in zip(features.means, features.target.means, strict=True):
            points = pool.double()
            variance = (points - points.mean(0)).square().sum(1).mean()
            scale = variance.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
            scaled.append(points / scale)
            aims.append(target.double().mean(0) / scale)
        points, aim = torch.cat(scaled, 1), torch.cat(aims)
        chosen = match_mean(points, aim, count)
        self.facts = {
            "distance": float((points[chosen].mean(0) - aim).square().sum()),
            "distance_of_the_pool": float((points.mean(0) - aim).square().sum()),
        }
        return chosen
