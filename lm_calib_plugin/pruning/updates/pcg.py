"""Re-fit of the kept weights by masked conjugate gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.descent import check_fallen
from lm_calib_plugin.pruning.parts import Selection, Strength, Update
from lm_calib_plugin.pruning.refit import Metric, refitted
from lm_calib_plugin.pruning.shrinkage import damped_gram
from lm_calib_plugin.pruning.swapping import swap_descent
from lm_calib_plugin.statistics import Gram, LayerStats

# Part of the steps that come before exchanges, where there are any.
FIRST = 0.25


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
        Before the re-fit, exchange so many weights of a row, at most, a returning weight at its
        best value; where the score found no values, after a first re-fit of a quarter of the steps.
        0: none.
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
    revision: ClassVar[int] = 2
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
        return self.update_together([weight], [selection], stats, strength)[0]

    def update_together(
        self,
        weights: Sequence[Tensor],
        selections: Sequence[Selection],
        stats: LayerStats | None,
        strength: Strength,
    ) -> list[Selection]:
        """Re-fit layers one after the other, on matrices that are prepared once."""
        gram = damped_gram(stats, strength.damp, self.shrink, weights[0])
        metric = Metric.of(gram, self._other(stats))
        found = []
        for weight, selection in zip(weights, selections, strict=True):
            keep, values = self._solved(weight, selection, gram, metric, strength.n_of_m)
            damp = selection.damped(strength.damp)
            found.append(selection.but(keep=keep, weight=values, solved="pcg", damp=damp))
        return found

    def _solved(
        self,
        weight: Tensor,
        selection: Selection,
        gram: Tensor,
        metric: Metric,
        n_of_m: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return mask and values. What one stage starts from tells what the one before reached."""
        keep, values = selection.keep, selection.weight
        if not self.swaps:
            return keep, refitted(weight, keep, metric, self.steps, values).weight
        fit = None
        if values is None:
            # Exchanges need values that are nearly the best ones; the second re-fit does the rest.
            steps = max(1, round(self.steps * FIRST))
            fit = refitted(weight, keep, metric, steps, check=False)
            values = fit.weight
        moved = swap_descent(weight, keep, gram, self.swaps, n_of_m, kept=values, check=False)
        if fit is not None:
            check_fallen(fit.started, weight - fit.weight, gram, "re-fit", moved.started)
        again = refitted(weight, moved.keep, metric, self.steps, moved.weight)
        error = weight - moved.weight
        check_fallen(moved.started, error, gram, "exchange of weights", again.started)
        return moved.keep, again.weight

    def _other(self, stats: LayerStats | None) -> Tensor | None:
        other = stats.heldout if self.heldout and stats is not None else None
        return other.gram() if isinstance(other, Gram) and other.tokens else None
