"""Update of optimal brain surgeon: the sweep of SparseGPT over any mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.obs import gram_factor, sweep_together
from lm_calib_plugin.pruning.parts import Selection, Strength, Update
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class OBS(Update):
    """Spread the error of each removed weight over the columns to its right (SparseGPT).

    After ``score=sparsegpt`` this is the paper's method, whose mask and update come from one sweep.
    """

    sweeps: ClassVar[bool] = True
    statistic: ClassVar[str] = "gram"
    uses_damp: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2301.00774"

    def update(
        self,
        weight: Tensor,
        selection: Selection,
        stats: LayerStats | None,
        strength: Strength,
    ) -> Selection:
        """Return the weights after the sweep; those that a score found in the same sweep stay."""
        return self.update_together([weight], [selection], stats, strength)[0]

    def update_together(
        self,
        weights: Sequence[Tensor],
        selections: Sequence[Selection],
        stats: LayerStats | None,
        strength: Strength,
    ) -> list[Selection]:
        """Update all layers with one factor and in one sweep."""
        if all(one.solved == "obs" and one.weight is not None for one in selections):
            return list(selections)
        factor = gram_factor(stats, strength.damp, weights[0].device)
        swept = sweep_together(weights, factor, strength, [one.keep for one in selections])
        return [
            one.but(weight=found, solved="obs", damp=factor.damp)
            for one, (found, _) in zip(selections, swept, strict=True)
        ]
