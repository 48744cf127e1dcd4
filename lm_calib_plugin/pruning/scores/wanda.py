"""Wanda: remove weights whose product with the input norm is smallest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.parts import Score
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class Wanda(Score):
    """Score ``|W_ij| * ||x_j||_2``, compared within each output row (Sun et al., section 3).

    Exact counts and the paper's code agree here, so ``compat=reference`` changes nothing.
    """

    statistic: ClassVar[str] = "moments"
    rows_independent: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.11695"
    comparable: ClassVar[bool] = True
    group: ClassVar[str] = "row"

    def scores(self, weight: Tensor, stats: LayerStats | None) -> Tensor:
        """Return ``|W_ij| * ||x_j||``, ``[out, in]``."""
        if stats is None:
            raise ValueError("wanda needs input statistics")
        return weight.abs() * stats.energy().to(weight.device).sqrt()
