"""Update of optimal brain surgeon: the sweep of SparseGPT over any mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.obs import gram_factor, sweep
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
        if selection.solved == "obs" and selection.weight is not None:
            return selection
        factor = gram_factor(stats, strength.damp, weight.device)
        swept, _ = sweep(weight, factor, strength, selection.keep)
        return selection.but(weight=swept, solved="obs", damp=factor.damp)
