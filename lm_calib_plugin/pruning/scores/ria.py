"""RIA: a weight's share of its row and of its column, times its activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.parts import Score
from lm_calib_plugin.statistics import LayerStats

ACTIVATION_POWER = 0.5  # alpha of the paper


@dataclass(frozen=True)
class RIA(Score):
    """Relative importance and activations (Zhang et al., section 3.2), compared over the layer.

    Score ``(|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||x_j||^(1/2)``. A row or a column of
    zeros has no shares; its scores are zero.
    """

    statistic: ClassVar[str] = "moments"
    paper: ClassVar[str] = "https://openreview.net/forum?id=Tr0lPx9woF"
    comparable: ClassVar[bool] = True
    group: ClassVar[str] = "layer"

    def scores(self, weight: Tensor, stats: LayerStats | None) -> Tensor:
        """Return the relative importance times the root of the input norm, ``[out, in]``."""
        if stats is None:
            raise ValueError("ria needs input statistics")
        size = weight.abs()
        tiny = 1e-30  # of weights that are zero themselves, so that 0 / 0 is 0
        share = size / size.sum(0, keepdim=True).clamp_min(tiny)
        share = share + size / size.sum(1, keepdim=True).clamp_min(tiny)
        norm = stats.energy().to(weight.device).sqrt()
        return share * norm**ACTIVATION_POWER
