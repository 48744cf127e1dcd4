"""FLAP: remove the heads and neurons whose output fluctuates least, put their mean in a bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.pruning.masks import removed_count
from lm_calib_plugin.pruning.structure.base import WidthMethod


@dataclass(frozen=True)
class Flap(WidthMethod):
    """Score ``Var(x_j) * ||W_:j||^2``, standardized, ranked over the whole model (An et al.).

    Scores of attention are squared once more, as in the authors' code. Then the scores of one
    projection are standardized, their mean is taken over the channels of a unit (a key/value head
    with all its query heads, or a neuron), and the lowest units of the model go until ``sparsity``
    of the parameters of all units is reached. Unlike in that code the variance is that of all
    tokens, and a unit counts what it really holds instead of 512/3 neurons for a head.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2312.11983"

    def unit_scores(self, weight: Tensor, variance: Tensor, width: int, attention: bool) -> Tensor:
        """Return the standardized score of every unit, ``[in / width]``, in float64."""
        scores = variance.double() * weight.double().square().sum(dim=0)
        if attention:
            scores = scores.square()
        spread = scores.std() if scores.numel() > 1 else torch.zeros_like(scores[0])
        centered = scores - scores.mean()
        scaled = centered / spread if spread > 0 else torch.zeros_like(centered)
        return scaled.reshape(-1, width).mean(dim=1)

    def choose(self, scores: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Remove the lowest units of the model as long as they fit into the budget.

        Of equal scores the earlier projection and the lower index go first.
        """
        flat = torch.cat([s.double().cpu() for s in scores])
        counts = [s.numel() for s in scores]
        weights = torch.cat([torch.full((n,), p) for n, p in zip(counts, sizes, strict=True)])
        order = flat.argsort(stable=True)
        fits = weights[order].cumsum(0) <= removed_count(int(weights.sum()), self.sparsity)
        removed = torch.zeros(flat.numel(), dtype=torch.bool)
        removed[order[fits]] = True
        return list(removed.split(counts))

    def compensation(self, weight: Tensor, mean: Tensor, removed: Tensor) -> Tensor:
        """Return ``W (mean * removed)``: what the removed inputs added on average, ``[out]``."""
        return weight.double() @ (mean.double() * removed.to(mean.device))
