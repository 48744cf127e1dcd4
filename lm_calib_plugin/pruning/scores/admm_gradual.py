"""A mask that grows while the weights are solved for by alternating directions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.pruning.admm import Splitting, solved_by, unit_gram
from lm_calib_plugin.pruning.masks import as_typed, keep_highest, keep_n_of_m
from lm_calib_plugin.pruning.parts import Score, Selection, Strength
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class ADMMGradual(Score):
    """Smallest ``|W + U|`` of ADMM, chosen anew in each of its first steps (Boza, section 3.3).

    The fraction removed grows as ``s (1 - (1 - t/15)^3)``, compared over the layer; then the mask
    stays as it is. For N:M, the N largest of each group are never removed, and the others go in the
    order of their size. ``compat=reference`` removes all of ``s`` from the first step on, as the
    released code does for unstructured masks (its N:M is 2:4 whatever was asked; not here).

    Parameters
    ----------
    rho
        Penalty.
    steps
        Number of iterations.
    mask_steps
        Number of iterations that choose the mask.
    """

    statistic: ClassVar[str] = "gram"
    uses_damp: ClassVar[bool] = True
    uses_compat: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.02938"
    group: ClassVar[str] = "layer"

    rho: float = 1.0
    steps: int = 20
    mask_steps: int = 15

    def __post_init__(self) -> None:
        self.at_least("rho", 1e-6)
        self.at_least("mask_steps", 1)
        self.at_least("steps", self.mask_steps)

    def select(self, weight: Tensor, stats: LayerStats | None, strength: Strength) -> Selection:
        """Return the mask of the last choice, and the weights after the last step."""
        gram = unit_gram(stats, weight.device)
        split = Splitting(gram.matrix, gram.scaled(weight), strength.damp, self.rho)
        keep = torch.ones_like(weight, dtype=torch.bool)
        for step in range(1, self.steps + 1):
            if step <= self.mask_steps:
                part = 1 - (1 - Fraction(step, self.mask_steps)) ** 3
                keep = _mask(split.values.abs(), part, strength)
            split.step(keep)
        if keep.all():
            return Selection(keep, damp=strength.damp)
        found = gram.restored(split.values, weight)
        return Selection(keep, found, solved=solved_by(self.rho, self.steps), damp=strength.damp)


def _mask(sizes: Tensor, part: Fraction, strength: Strength) -> Tensor:
    """Return the mask of what stays when ``part`` of what is to go goes."""
    if strength.n_of_m:
        keep = keep_n_of_m(sizes, *strength.n_of_m)
        # What is kept for good is no candidate.
        rest = sizes.masked_fill(keep, math.inf).reshape(1, -1)
        count = math.floor(int((~keep).sum()) * part)
        return keep_highest(rest, count).reshape(sizes.shape)
    now = replace(strength, compat=None)
    if not (strength.reference and (strength.group or ADMMGradual.group) == "layer"):
        now = replace(now, sparsity=as_typed(strength.sparsity) * part)
    return now.keep(sizes, ADMMGradual.group)
