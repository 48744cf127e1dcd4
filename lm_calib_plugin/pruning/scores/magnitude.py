"""Magnitude pruning: remove the smallest weights of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.parts import Score
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class Magnitude(Score):
    """Score ``|W|``, compared over the whole matrix (Han et al., arXiv 1506.02626).

    Needs no data. ``compat=reference`` uses the threshold rule of common code, which removes
    ties beyond the asked count.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1506.02626"
    comparable: ClassVar[bool] = True
    group: ClassVar[str] = "layer"
    rows_independent: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def scores(self, weight: Tensor, stats: LayerStats | None) -> Tensor:
        """Return ``|W|``, ``[out, in]``."""
        return weight.abs()
