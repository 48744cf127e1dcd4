"""ShortGPT: remove the blocks that turn their input the least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.structure.base import BLOCK, DepthMethod, chord


@dataclass(frozen=True)
class ShortGPT(DepthMethod):
    """Block influence ``1 - E cos(h_in, h_out)`` (Men et al.), the lowest go at once.

    One dense pass. The cosine is taken token by token, never between all pairs of tokens.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.03853"
    sublayer: str = BLOCK

    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        """Return ``1 - cos(before, after)``, ``[rows]``."""
        return chord(before, after).square() / 2
