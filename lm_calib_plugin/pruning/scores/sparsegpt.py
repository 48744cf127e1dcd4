"""SparseGPT: second-order saliency, chosen block by block from weights already updated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.obs import gram_factor, saliency, sweep_together
from lm_calib_plugin.pruning.parts import Score, Selection, Strength
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class SparseGPT(Score):
    """Saliency ``W_ij^2 / U_jj^2`` of optimal brain surgeon (Frantar and Alistarh, algorithm 1).

    In its own group (all rows of 128 columns) and for N:M, weights are scored while the sweep of
    ``update=obs`` passes, from the values that it has reached. In another group they are scored
    once, from the dense weight. ``compat=reference``: threshold rule of the paper's code (one
    weight more per block, and ties), and weights of inputs that were always zero go beforehand.
    """

    statistic: ClassVar[str] = "gram"
    uses_damp: ClassVar[bool] = True
    uses_compat: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2301.00774"
    group: ClassVar[str] = "block128"

    def select(self, weight: Tensor, stats: LayerStats | None, strength: Strength) -> Selection:
        """Return mask and weights of the sweep, or the mask of scores compared in another group."""
        return self.select_together([weight], stats, strength)[0]

    def select_together(
        self, weights: Sequence[Tensor], stats: LayerStats | None, strength: Strength
    ) -> list[Selection]:
        """Select with one factor, and in one sweep, in all layers."""
        factor = gram_factor(stats, strength.damp, weights[0].device)
        if strength.n_of_m or (strength.group or self.group) == self.group:
            return [
                Selection(keep, swept, solved="obs", damp=factor.damp)
                for swept, keep in sweep_together(weights, factor, strength)
            ]
        diagonal, dead = factor.upper.diagonal(), factor.dead
        scores = [saliency(weight.t(), diagonal, dead).t().contiguous() for weight in weights]
        return [Selection(strength.keep(x, self.group), damp=factor.damp) for x in scores]
