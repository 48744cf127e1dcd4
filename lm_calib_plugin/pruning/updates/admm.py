"""Weight update by alternating directions on a given mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.admm import Splitting, solved_by, unit_gram
from lm_calib_plugin.pruning.parts import Selection, Strength, Update
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class ADMMUpdate(Update):
    """Twenty steps of ADMM on the mask that was chosen (Boza, algorithm 1).

    The Gram matrix is scaled to unit diagonal before ``damp`` is added to it: the paper's ridge is
    0.1, the default of ``method=admm``. After ``score=admm_gradual`` with the same options this is
    the paper's method with a gradual mask, whose weights come from one run.

    Parameters
    ----------
    rho
        Penalty.
    steps
        Number of iterations.
    """

    statistic: ClassVar[str] = "gram"
    uses_damp: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.02938"

    rho: float = 1.0
    steps: int = 20

    def __post_init__(self) -> None:
        self.at_least("rho", 1e-6)
        self.at_least("steps", 1)

    def update(
        self,
        weight: Tensor,
        selection: Selection,
        stats: LayerStats | None,
        strength: Strength,
    ) -> Selection:
        """Return the weights after the last step; those that a score found in this way stay."""
        name = solved_by(self.rho, self.steps)
        if selection.solved == name and selection.weight is not None:
            return selection
        if selection.keep.all():
            return selection.but(weight=None, damp=strength.damp)
        gram = unit_gram(stats, weight.device)
        split = Splitting(gram.matrix, gram.scaled(weight), strength.damp, self.rho)
        for _ in range(self.steps):
            split.step(selection.keep)
        found = gram.restored(split.values, weight)
        damp = selection.damped(strength.damp)
        return selection.but(weight=found, solved=name, damp=damp)
