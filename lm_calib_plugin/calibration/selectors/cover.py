"""``cover``: every outlier channel is activated by some sequence (COVERCAL, arXiv 2604.24008).

Of each input of linear layers, with ``a_c`` the largest magnitude of channel ``c`` in the pool:
a channel is an outlier when ``a_c`` is more than six times the median over channels; a sequence
covers it when its own maximum reaches 0.9 of the 99th percentile of the maxima over the pool; it
weighs ``a_c^2`` times the squared norms of the weight columns that read it. Greedy weighted set
cover comes within 1 - 1/e of the largest weight that as many sequences can cover. The threshold
of six is ours, the paper's is not known to us.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.features import Features
from lm_calib_plugin.calibration.selectors.greedy import greedy_cover
from lm_calib_plugin.calibration.selectors.probes import Maxima

OUTLIER = 6.0
PERCENTILE = 0.99
REACHED = 0.9


class OutlierCover(Selector):
    """Each step takes the candidate that covers the most weight not covered yet."""

    needs = frozenset({"maxima"})
    paper = "https://arxiv.org/abs/2604.24008"

    def select(
        self, candidates: Sequence[Tensor], count: int, features: Features, seed: int
    ) -> list[int]:
        """Cover; when nothing more can be covered, begin again with those that remain."""
        sets, weights = covered_channels(features.maxima, len(candidates))
        chosen, covers = greedy_cover(sets, count, weights)
        if not any(sets):
            self.warnings.append(
                "select=cover: no channel of this model is an outlier, so there is nothing to "
                "cover; the first sequences of the pool were taken"
            )
        reached = set().union(*(sets[i] for i in chosen))
        self.facts = {
            "outlier_channels": len(weights),
            "covered_channels": len(reached),
            "covers": covers,
        }
        return chosen


def covered_channels(
    inputs: Sequence[Maxima], total: int
) -> tuple[list[set[Hashable]], dict[Hashable, float]]:
    """Return the outlier channels that each candidate covers, and the weight of each channel."""
    sets: list[set[Hashable]] = [set() for _ in range(total)]
    weights: dict[Hashable, float] = {}
    for number, found in enumerate(inputs):
        largest = found.values.amax(0)
        outliers = (largest > OUTLIER * largest.median()).nonzero().flatten()
        values = found.values[:, outliers].double()
        needed = REACHED * torch.from_numpy(np.quantile(values.numpy(), PERCENTILE, axis=0))
        mass = (largest[outliers].double().square() * found.energy[outliers]).tolist()
        names = [(number, channel) for channel in outliers.tolist()]
        weights |= zip(names, mass, strict=True)
        for place, channel in (values >= needed).nonzero().tolist():
            sets[place].add(names[channel])
    return sets, weights
