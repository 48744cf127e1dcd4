"""ALPS: the support is searched by alternating directions with a growing penalty."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.pruning.admm import UnitGram, inverse, unit_gram
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
        gram = unit_gram(stats, weight.device, strength.damp)
        search = _Search(gram, gram.scaled(weight), strength, self.rho)
        if search.keep.all():
            return Selection(search.keep, damp=strength.damp)
        for step in range(1, self.steps + 1):
            search.step()
            if step % LOOK == 0 and search.settled(step):
                break
        keep, values = search.found()
        weight = gram.restored(values, weight)
        return Selection(keep, weight, solved="admm_alps", damp=strength.damp)


class _Search:
    """State of the search; matrices ``[out, in]`` on the scale of unit inputs.

    ``point`` is ``B + V / rho``: its kept entries are ``D``, and the others, times ``rho``, are the
    multipliers ``V``, which vanish where weights are kept.
    """

    def __init__(self, gram: UnitGram, dense: Tensor, strength: Strength, rho: float) -> None:
        self.gram, self.dense, self.strength = gram, dense, strength
        self.target = dense @ gram.matrix
        self.keep = self.largest(dense)
        self.first = self.seen = self.keep
        self.moved = False
        self.set_rho(rho)
        self.start()

    def start(self) -> None:
        """Take the dense weights and no multipliers."""
        self.keep = self.first
        self.kept = torch.where(self.first, self.dense, 0.0)
        self.multipliers = torch.zeros_like(self.dense)

    def set_rho(self, rho: float) -> None:
        """Change the penalty, and with it the inverse."""
        self.rho = min(rho, RHO_CAP)
        self.inverse = inverse(self.gram.matrix, self.rho)

    def largest(self, values: Tensor) -> Tensor:
        """Return the mask of the largest values."""
        return replace(self.strength, compat=None).keep(values.abs(), ADMM.group)

    def step(self) -> None:
        """Do one iteration."""
        right = self.target.sub(self.multipliers).add_(self.kept, alpha=self.rho)
        self.ridge = right @ self.inverse
        point = self.ridge.add(self.multipliers, alpha=1 / self.rho)
        self.keep = self.largest(point)
        self.kept = point * self.keep
        self.multipliers = point.sub_(self.kept).mul_(self.rho)

    def settled(self, step: int) -> bool:
        """Look at the support: tell whether to end, or change the penalty."""
        changes = int((self.keep != self.seen).sum())
        share = changes / max(1, int(self.keep.sum()))
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

    def found(self) -> tuple[Tensor, Tensor]:
        """Return the support, and values on it."""
        if not self.strength.reference:
            return self.keep, self.kept
        return self.largest(self.ridge), self.ridge
