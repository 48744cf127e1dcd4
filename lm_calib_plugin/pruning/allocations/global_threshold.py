"""One threshold over all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.pruning.allocations.base import Allocation, LayerFacts
from lm_calib_plugin.pruning.masks import removed_count
from lm_calib_plugin.pruning.parts import Score

HALF = 1 << 16


@dataclass(frozen=True)
class Global(Allocation):
    """The lowest scores of all layers together go; every layer is one comparison group.

    Scores are those of the dense model per token, so that layers that saw different numbers of
    tokens (experts) can be compared. Exactly ``floor(n * sparsity)`` weights go; among equal scores
    those of earlier layers first.
    """

    whole_layer: ClassVar[bool] = True

    def fractions(
        self, layers: Sequence[LayerFacts], sparsity: float, score: Score
    ) -> list[float | Fraction]:
        """Return exact shares: weights of the layer below the threshold, of all it has."""
        if not score.comparable:
            raise UserError(
                "allocation",
                f"`{type(score).__name__.lower()}` has no scores to compare between layers",
                "scores from weights and second moments: magnitude, wanda, ria, random",
            )
        count = removed_count(sum(layer.size for layer in layers), sparsity)

        def scores() -> Iterator[Tensor]:
            for layer in layers:
                yield score.scores(layer.read(), layer.stats).flatten()

        threshold = _smallest(scores, count)
        counted = [(int((s < threshold).sum()), int((s == threshold).sum())) for s in scores()]
        missing = count - sum(less for less, _ in counted)
        shares: list[float | Fraction] = []
        for layer, (less, tied) in zip(layers, counted, strict=True):
            more = min(tied, missing)
            missing -= more
            shares.append(Fraction(less + more, layer.size))
        return shares


def _smallest(scores: Callable[[], Iterator[Tensor]], count: int) -> float:
    """Return the ``count``-th smallest of all scores in two passes, without keeping them.

    Bit patterns of non-negative float32 numbers are ordered like the numbers: the upper half of
    the bits is counted first, then the lower half of those that share the right upper half.
    """
    if count <= 0:
        return -1.0
    upper = torch.zeros(HALF, dtype=torch.long)
    for part in scores():
        upper += torch.bincount(_bits(part) >> 16, minlength=HALF).cpu()
    high = int((upper.cumsum(0) >= count).nonzero()[0])
    rest = count - int(upper[:high].sum())
    lower = torch.zeros(HALF, dtype=torch.long)
    for part in scores():
        bits = _bits(part)
        lower += torch.bincount(bits[(bits >> 16) == high] & (HALF - 1), minlength=HALF).cpu()
    low = int((lower.cumsum(0) >= rest).nonzero()[0])
    return float(torch.tensor([(high << 16) | low], dtype=torch.int32).view(torch.float32))


def _bits(scores: Tensor) -> Tensor:
    # Adding zero turns -0.0 into 0.0.
    return (scores.float() + 0.0).contiguous().view(torch.int32).long()
