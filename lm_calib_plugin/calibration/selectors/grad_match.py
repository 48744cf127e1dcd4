"""``grad_match``: sequences whose gradients point where those of target sequences do.

After LESS (arXiv 2402.04333), without its warm-up training: gradients are those of the dense
model with respect to a random adapter (:mod:`.gradients`). Similarity is the cosine with the mean
gradient of the target. The next choice has the largest ``0.7 similarity - 0.3 closest``, with
``closest`` its largest cosine with a chosen one (maximal marginal relevance).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.features import Features

DIVERSITY = 0.3


class GradientMatch(Selector):
    """Similar to the target, different from each other."""

    needs = frozenset({"gradients"})
    takes_target = True
    paper = "https://arxiv.org/abs/2402.04333"

    def select(
        self, candidates: Sequence[Tensor], count: int, features: Features, seed: int
    ) -> list[int]:
        """Rank by marginal relevance; nothing is drawn."""
        gradients = functional.normalize(features.gradients, dim=1)
        aim = functional.normalize(features.target.gradients.mean(0), dim=0)
        similarity = gradients @ aim
        chosen = marginal_relevance(gradients, similarity, count)
        self.facts = {
            "similarity": float(similarity[chosen].mean()),
            "similarity_of_the_pool": float(similarity.mean()),
        }
        return chosen


def marginal_relevance(directions: Tensor, similarity: Tensor, count: int) -> list[int]:
    """Return places in order of choice; ``directions`` are unit vectors ``[points, width]``."""
    free = torch.ones(len(directions), dtype=torch.bool)
    chosen = [int(similarity.argmax())]
    closest = directions @ directions[chosen[0]]
    while len(chosen) < count:
        free[chosen[-1]] = False
        score = (1 - DIVERSITY) * similarity - DIVERSITY * closest
        chosen.append(int(score.masked_fill(~free, -torch.inf).argmax()))
        closest = torch.maximum(closest, directions @ directions[chosen[-1]])
    return chosen
