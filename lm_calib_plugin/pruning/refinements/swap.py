"""Refinement of a mask by exact exchanges of one weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.parts import Refinement, Selection, Strength
from lm_calib_plugin.pruning.shrinkage import damped_gram
from lm_calib_plugin.pruning.swapping import swap_descent
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class Swap(Refinement):
    """Exchange a kept and a removed weight of a row while that lowers the output error.

    The error is that of dropping the removed weights, ``tr((W - W') G (W - W')^T)``; the gain of an
    exchange is exact (arXiv 2512.10922; the formula is derived in
    :mod:`lm_calib_plugin.pruning.swapping`). The count of every row, and with N:M of every group,
    stays.

    Parameters
    ----------
    steps
        Most exchanges in a row.
    candidates
        Weights of each side that are paired: those that cost least, and those that gain most; 0:
        all pairs, at a high price. With N:M all pairs of every group are tried.
    shrink
        Part of its own energy by which each input counts more, alone; correlations shrink.
    """

    steps: int = 100
    candidates: int = 32
    shrink: float = 0.0

    statistic: ClassVar[str] = "gram"
    uses_damp: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.10922"

    def __post_init__(self) -> None:
        self.at_least("steps", 0)
        self.at_least("candidates", 0)
        self.at_least("shrink", 0)

    def refine(
        self,
        weight: Tensor,
        selection: Selection,
        stats: LayerStats | None,
        strength: Strength,
    ) -> Selection:
        """Return the selection with the mask exchanged, values those of the dense layer."""
        gram = damped_gram(stats, strength.damp, self.shrink, weight)
        found = swap_descent(
            weight, selection.keep, gram, self.steps, strength.n_of_m, self.candidates
        )
        damp = selection.damped(strength.damp)
        return selection.but(keep=found.keep, weight=None, solved="", damp=damp)
