"""Depth pruning by what the language-model loss becomes without a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lm_calib_plugin.pruning.structure.base import BLOCK, DepthMethod


@dataclass(frozen=True)
class DepthLoss(DepthMethod):
    """Increase of the mean loss of the calibration tokens when one part is left out.

    Leave-one-out, as in the code of Siddiqui et al.: every part is left out of the whole model
    once, and the lowest go together. It is measured with the model's own output head.

    Parameters
    ----------
    greedy
        Remove one at a time and measure the others anew in what is left.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2407.16286"
    measure: ClassVar[Literal["distance", "loss"]] = "loss"
    sublayer: str = BLOCK
    greedy: bool = False
