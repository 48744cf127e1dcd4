"""ALPS: the support is searched by alternating directions with a growing penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.pruning.admm import Inverses, UnitGram, unit_gram
from lm_calib_plugin.pruning.parts import Score, Selection, Strength
from lm_calib_plugin.statistics import LayerStats

LOOK = 3  # iterations between two looks at the support
PATIENCE = 30  # iterations after which a support that hardly changes is taken
RHO_CAP = 1e6


@dataclass(frozen=True)
class ADMM(Score):
    """Support found by ADMM with a growing penalty, over the layer (Meng et al., algorithm 1).

    With ``H`` the damped Gram matrix scaled to unit diagonal, and weights scaled accordingly:
    ``B <- (H + rho I)^-1 (H W - V + rho D)``, ``D <- largest of (B + V / rho)``,
    ``V <- V + rho (B - D)``. Every third iteration the penalty ``rho`` is multiplied by 1.3, 1.2 or
    1.1 when the support moved by 10 %, 0.5 % or at least one of the weights that are kept (section
    3.2), and the search ends when nothing moved (after 30 iterations, when fewer than 0.03 % did).
    While it never moved much, ``rho`` is divided by five, and the search starts again.

    Mask and values are those of ``D`` when the search ends; ``compat=reference`` takes the largest
    of ``B``, as the paper's code does. Counts are exact in both.

    Parameters
    ----------
    rho
        First penalty.
    steps
        Largest number of iterations.
    """

    statistic: ClassVar[str] = "gram"
    uses_damp: ClassVar[bool] = True
    uses_compat: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.07831"
    group: ClassVar[str] = "layer"

    rho: float = 0.1
    steps: int = 300

    def __post_init__(self) -> None:
        self.at_least("rho", 1e-6)
        self.at_least("steps", 1)

    def select(self, weight: Tensor, stats: LayerStats | None, strength: Strength) -> Selection:
        """Return support and values of the search, values on the scale of the weight."""
        return self.select_together([weight], stats, strength)[0]

    def select_together(
        self, weights: Sequence[Tensor], stats: LayerStats | None, strength: Strength
    ) -> list[Selection]:
        """Search for all layers side by side: where penalties agree, they share an inverse."""
        gram = unit_gram(stats, weights[0].device, strength.damp)
        inverses = Inverses(gram.matrix)
        searches = [_Search(gram, weight, strength, self.rho) for weight in weights]
        going = [search for search in searches if not search.keep.all()]
        for step in range(1, self.steps + 1):
            for search in going:
                search.step(inverses)
            if step % LOOK == 0 and step < self.steps:
                going = [search for search in going if not search.settled(step)]
                inverses.only({search.rho for search in going})
        return [search.selection() for search in searches]


class _Search:
    """State of the search in one layer; matrices ``[out, in]`` on the scale of unit inputs.

    ``point`` is ``B + V / rho``: its kept entries are ``D``, and the others, times ``rho``, are the
    multipliers ``V``, which vanish where weights are kept.
    """

    def __init__(self, gram: UnitGram, weight: Tensor, strength: Strength, rho: float) -> None:
        self.gram, self.weight, self.strength = gram, weight, strength
        self.dense = gram.scaled(weight)
        self.keep = self.largest(self.dense)
        self.first = self.seen = self.keep
        if self.keep.all():
            return
        self.target = self.dense @ gram.matrix
        self.moved = False
        self.ridge: Tensor | None = None
        self.rho = min(rho, RHO_CAP)
        self.right = self.target / self.rho
        self.start()

    def start(self) -> None:
        """Take the dense weights and no multipliers."""
        self.keep = self.first
        self.point = torch.where(self.first, self.dense, 0.0)

    def set_rho(self, rho: float) -> None:
        """Change the penalty; the multipliers stay what they are."""
        before, self.rho = self.rho, min(rho, RHO_CAP)
        gone = self.point * ~self.keep
        self.point.add_(gone, alpha=before / self.rho - 1.0)
        self.right = self.target / self.rho

    def largest(self, values: Tensor) -> Tensor:
        """Return the mask of the largest values."""
        return replace(self.strength, compat=None).keep(values.abs(), ADMM.group)

    def step(self, inverses: Inverses) -> None:
        """Do one iteration."""
        gone = self.point * ~self.keep  # in less time than by a choice: masks have no pattern
        # (H W - V + rho D) / rho, and the inverse times rho.
        right = torch.add(self.right, self.point).sub_(gone, alpha=2.0)
        inverse = inverses.times_shift(self.rho)
        if self.strength.reference:
            self.ridge = right @ inverse
            self.point = gone.add_(self.ridge)
        else:
            self.point = gone.addmm_(right, inverse)
        self.keep = self.largest(self.point)

    def settled(self, step: int) -> bool:
        """Look at the support: tell whether to end, or change the penalty."""
        changes = int((self.keep != self.seen).count_nonzero())
        share = changes / max(1, int(self.keep.count_nonzero()))
        self.seen = self.keep
        if changes and (self.moved or share > 0.005):
            self.moved = True
            factor = 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
            if step > PATIENCE and share < 3e-4:
                return True
            self.set_rho(self.rho * factor)
            return False
        if self.moved or (step > PATIENCE and share < 3e-4):
            return True
        self.set_rho(self.rho / 5)
        if changes:
            self.start()
        return False

    def selection(self) -> Selection:
        """Return the support, and values on it."""
        keep, damp = self.keep, self.strength.damp
        if self.first.all():
            return Selection(self.first, damp=damp)
        values = self.point
        if self.ridge is not None:
            keep, values = self.largest(self.ridge), self.ridge
        weight = self.gram.restored(values, self.weight)
        return Selection(keep, weight, solved="admm_alps", damp=damp)
