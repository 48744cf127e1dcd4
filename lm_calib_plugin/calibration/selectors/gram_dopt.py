"""``gram_dopt``: activations in all directions, by greedy D-optimal design.

Each step raises ``log det(lambda I + sum of x x^T)`` over the chosen the most; ``x`` are the
features of ``kmeans`` and ``lambda`` is a hundredth of the mean diagonal of the pool's second
moment. Sherman and Morrison's rule keeps the inverse at one product a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.features import Features

RIDGE = 1e-2


class DOptimal(Selector):
    """Each step takes the candidate of largest ``x^T M^-1 x``."""

    needs = frozenset({"means"})
    paper = "https://arxiv.org/abs/1207.6083"

    def select(
        self, candidates: Sequence[Tensor], count: int, features: Features, seed: int
    ) -> list[int]:
        """Design; nothing is drawn, equal gains go to the earlier candidate."""
        chosen, log_det = d_optimal(features.projected(), count)
        self.facts = {"log_det": log_det}
        return chosen


def d_optimal(points: Tensor, count: int) -> tuple[list[int], float]:
    """Return places in order of choice and the log determinant reached (``points`` float64)."""
    width = points.shape[1]
    ridge = RIDGE * float(points.square().mean())
    ridge = ridge or 1.0  # a pool of zeros
    inverse = torch.eye(width, dtype=torch.float64) / ridge
    log_det = width * torch.tensor(ridge).double().log()
    free = torch.ones(len(points), dtype=torch.bool)
    chosen: list[int] = []
    for _ in range(count):
        gains = ((points @ inverse) * points).sum(1)
        best = int(gains.masked_fill(~free, -1).argmax())
        step = inverse @ points[best]
        inverse = inverse - torch.outer(step, step) / (1 + gains[best])
        log_det = log_det + torch.log1p(gains[best])
        free[best] = False
        chosen.append(best)
    return chosen, float(log_det)
