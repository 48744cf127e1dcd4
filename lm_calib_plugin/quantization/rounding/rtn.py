"""Round to nearest: the data-free zero point of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.method import LayerResult
from lm_calib_plugin.quantization.grids import Grid
from lm_calib_plugin.quantization.parts import Rounding, Setting
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class RTN(Rounding):
    """Round every weight to the nearest level (arXiv 2206.01861)."""

    permutation_safe: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2206.01861"

    def round(
        self, weight: Tensor, grid: Grid, stats: LayerStats | None, setting: Setting
    ) -> LayerResult:
        """Round one weight ``[out, in]``."""
        return LayerResult(grid.round(weight), grid=grid)
