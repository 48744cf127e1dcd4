"""MSE: the range of each group whose rounding changes its weights least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.quantization.gridrules.search import RangeSearch
from lm_calib_plugin.quantization.grids import Grid, GridSpec
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class MSE(RangeSearch):
    """Shrink each range to where the sum of squared rounding errors is smallest; data-free.

    Clipping few large weights makes the steps of all others smaller (arXiv 1810.05723; here by a
    search instead of a model of the distribution).
    """

    rows_independent: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/1810.05723"

    def fit(
        self, weight: Tensor, spec: GridSpec, stats: LayerStats | None, dtype: torch.dtype
    ) -> Grid:
        """Return the grid of one weight ``[out, in]``."""
        return self.best(weight, spec, dtype, lambda d: d.square_().sum(dim=-1))
