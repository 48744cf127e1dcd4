"""Wanda with rows of different density: each row gives up the same share of its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.pruning.parts import Score, Selection, Strength
from lm_calib_plugin.pruning.scores.wanda import Wanda
from lm_calib_plugin.statistics import LayerStats

HIGHEST_SHARE = 0.8
TOLERANCE = 1e-3


@dataclass(frozen=True)
class WandaVariant(Score):
    """Rows lose their smallest Wanda scores up to one share of the sum (Sun et al., appendix).

    A weight's score is the sum of the Wanda scores of its row up to its own, as a share of the sum
    of the row. These shares are compared over the layer, so that the count is exact, without a
    search for the share; of equal ones those of the first rows go first. ``compat=reference``
    searches the share in [0, 0.8] by bisection until the fraction removed is met within 0.001, as
    the paper's code does.

    Within a row, shares are ordered like Wanda scores: for N:M, and for ``group=row``, this is
    plain Wanda.
    """

    statistic: ClassVar[str] = "moments"
    rows_independent: ClassVar[bool] = True
    uses_compat: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.11695"
    group: ClassVar[str] = "layer"

    def scores(self, weight: Tensor, stats: LayerStats | None) -> Tensor:
        """Return the share of the row's sum up to each weight, ``[out, in]``, float64."""
        ranked, order = torch.sort(Wanda().scores(weight, stats), dim=1, stable=True)
        sums = ranked.double().cumsum(dim=1)
        shares = sums / sums[:, -1:].clamp_min(1e-300)
        return torch.empty_like(shares).scatter_(1, order, shares)

    def select(self, weight: Tensor, stats: LayerStats | None, strength: Strength) -> Selection:
        """Return the mask of the weights with the highest shares."""
        shares = self.scores(weight, stats)
        whole = strength.n_of_m is None and (strength.group or self.group) == self.group
        if strength.reference and whole:
            scores = Wanda().scores(weight, stats)
            return Selection(_by_bisection(scores, shares, float(strength.sparsity)))
        return Selection(strength.keep(shares, self.group))


def _by_bisection(scores: Tensor, shares: Tensor, sparsity: float) -> Tensor:
    """Return the mask of what stays; a row loses what scores no more than its last weight to go."""
    low, high, share = 0.0, HIGHEST_SHARE, HIGHEST_SHARE / 2
    while True:
        last = scores.masked_fill(shares > share, -1.0).amax(dim=1, keepdim=True)
        keep = scores > last
        removed = 1 - float(keep.double().mean())
        if abs(removed - sparsity) <= TOLERANCE or high - low < TOLERANCE:
            return keep
        low, high = (low, share) if removed > sparsity else (share, high)
        share = (low + high) / 2
