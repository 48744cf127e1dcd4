"""Re-fit of the kept weights by masked conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.parts import Selection, Strength, Update
from lm_calib_plugin.pruning.refit import masked_pcg
from lm_calib_plugin.pruning.shrinkage import damped_gram
from lm_calib_plugin.pruning.swapping import swap_descent
from lm_calib_plugin.statistics import Gram, LayerStats


@dataclass(frozen=True)
class PCG(Update):
    """Lower ``tr((W - V) G (W - V)^T)`` over all values of the kept weights (ALPS, section 3.3).

    Preconditioned conjugate gradients for all rows at once, from the values that a score found on
    the mask, or the dense ones. The ridge pulls towards the dense weights, not towards zero.

    Parameters
    ----------
    steps
        Most steps.
    swaps
        After the re-fit, exchange so many weights of a row, at most, a returning weight at its best
        value, and re-fit again; 0: none.
    shrink
        Part of its own energy by which each input counts more, alone; correlations shrink.
    heldout
        Keep the step with the lowest error on the sequences held out, where there are any.
    """

    steps: int = 20
    swaps: int = 0
    shrink: float = 0.0
    heldout: bool = True

    statistic: ClassVar[str] = "gram"
    uses_damp: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.07831"

    @property
    def uses_heldout(self) -> bool:  # type: ignore[override]
        """Whether the held-out sequences decide where to stop."""
        return self.heldout

    def __post_init__(self) -> None:
        self.at_least("steps", 1)
        self.at_least("swaps", 0)
        self.at_least("shrink", 0)

    def update(
        self,
        weight: Tensor,
        selection: Selection,
        stats: LayerStats | None,
        strength: Strength,
    ) -> Selection:
        """Return the selection with re-fitted weights, and after exchanges another mask."""
        gram = damped_gram(stats, strength.damp, self.shrink, weight)
        other = self._other(stats)
        keep, values = selection.keep, selection.weight
        found = masked_pcg(weight, keep, gram, self.steps, values, heldout=other)
        if self.swaps:
            moved = swap_descent(weight, keep, gram, self.swaps, strength.n_of_m, kept=found.weight)
            if moved.swaps:
                keep = moved.keep
                found = masked_pcg(weight, keep, gram, self.steps, moved.weight, heldout=other)
        damp = selection.damped(strength.damp)
        return selection.but(keep=keep, weight=found.weight, solved="pcg", damp=damp)

    def _other(self, stats: LayerStats | None) -> Tensor | None:
        other = stats.heldout if self.heldout and stats is not None else None
        return other.gram() if isinstance(other, Gram) and other.tokens else None
