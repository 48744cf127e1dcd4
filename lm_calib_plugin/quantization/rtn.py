"""Round to nearest: the data-free zero point of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.method import LayerResult
from lm_calib_plugin.quantization.base import QuantizationMethod
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class RTN(QuantizationMethod):
    """Round every weight to the nearest level of the min-max grid (arXiv 2206.01861)."""

    permutation_safe: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2206.01861"

    def compress(
        self, weight: Tensor, stats: LayerStats | None, dtype: torch.dtype = torch.float32
    ) -> LayerResult:
        """Round one weight ``[out, in]``."""
        grid = self.fit_grid(weight, dtype)
        return LayerResult(grid.round(weight), grid=grid)
