"""Random pruning: the control that every score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.pruning.parts import Score
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class Random(Score):
    """Uniform scores, compared within each row.

    Parameters
    ----------
    seed
        Seed of the scores. Layers of one shape get the same mask.
    """

    seed: int = 0

    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.at_least("seed", 0)

    def scores(self, weight: Tensor, stats: LayerStats | None) -> Tensor:
        """Return uniform numbers, ``[out, in]``."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(weight.shape, generator=generator).to(weight.device)
