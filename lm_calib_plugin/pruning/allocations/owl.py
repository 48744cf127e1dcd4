"""OWL: blocks with more outliers keep more weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from lm_calib_plugin.pruning.allocations.base import Allocation, LayerFacts, block_numbers
from lm_calib_plugin.pruning.parts import Score


@dataclass(frozen=True)
class OWL(Allocation):
    """Outlier-weighed layerwise sparsity (Yin et al., section 3).

    For every block, ``D`` is the percentage of its weights whose ``|W_ij| * ||x_j||`` is more than
    ``m`` times their mean over the block. Scaled to a range of ``2 * lambda``, it is what a block
    keeps beyond the mean. The mean is weighted by the number of weights, so that the budget is met
    when blocks differ in size; blocks without any difference are treated alike.

    Parameters
    ----------
    m
        What counts as an outlier; 5 as in the authors' runs (their code's default is 3).
    lambda_
        Half of the range of fractions, typed ``lambda``.
    """

    m: float = 5.0
    lambda_: float = 0.08

    statistic: ClassVar[str] = "moments"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.05175"

    def __post_init__(self) -> None:
        self.at_least("m", 0)
        self.at_least("lambda_", 0)

    def fractions(
        self, layers: Sequence[LayerFacts], sparsity: float, score: Score
    ) -> list[float | Fraction]:
        """Return one fraction for all layers of a block."""
        shares = {
            b: self.outliers([x for x in layers if x.block == b]) for b in block_numbers(layers)
        }
        low, high = min(shares.values()), max(shares.values())
        span = high - low
        kept = {b: (d - low) / span * 2 * self.lambda_ if span else 0.0 for b, d in shares.items()}
        return [sparsity - kept[layer.block] for layer in layers]

    def outliers(self, layers: Sequence[LayerFacts]) -> float:
        """Return the percentage of outliers among all weights of some layers."""
        scores = []
        for layer in layers:
            assert layer.stats is not None
            weight = layer.read()
            scores.append((weight.abs() * layer.stats.energy().to(weight.device).sqrt()).flatten())
        one = torch.cat([s.to(scores[0].device) for s in scores])
        return 100.0 * float((one > self.m * one.mean()).sum()) / one.numel()
