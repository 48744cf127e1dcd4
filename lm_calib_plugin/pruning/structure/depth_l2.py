"""Depth pruning by how much a block adds, measured in the 2-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.structure.base import BLOCK, DepthMethod, relative_change


@dataclass(frozen=True)
class DepthL2(DepthMethod):
    """Mean over tokens of ``||h_out - h_in||_2 / ||h_in||_2`` (Siddiqui et al.)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2407.16286"
    sublayer: str = BLOCK

    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the relative size of what was added, ``[rows]``."""
        return relative_change(before, after, 2)
