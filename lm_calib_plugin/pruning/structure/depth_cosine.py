"""Depth pruning by the cosine between what goes into a block and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.structure.base import BLOCK, DepthMethod, chord


@dataclass(frozen=True)
class DepthCosine(DepthMethod):
    """Mean over tokens of ``1 - cos(h_in, h_out)`` (Siddiqui et al.).

    For whole blocks this is the block influence of ShortGPT under the name of another paper, which
    also applies it to attention and MLP alone.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2407.16286"
    sublayer: str = BLOCK

    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        """Return ``1 - cos(before, after)``, ``[rows]``."""
        return chord(before, after).square() / 2
