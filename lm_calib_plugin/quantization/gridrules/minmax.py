"""Min-max: the levels span all weights of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.quantization.grids import Grid, GridSpec
from lm_calib_plugin.quantization.parts import GridRule
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class MinMax(GridRule):
    """Span the range of each group from its smallest to its largest weight."""

    rows_independent: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2206.01861"

    def fit(
        self, weight: Tensor, spec: GridSpec, stats: LayerStats | None, dtype: torch.dtype
    ) -> Grid:
        """Return the grid of one weight ``[out, in]``."""
        return spec.fit(weight, dtype)
