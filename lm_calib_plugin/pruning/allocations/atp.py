"""ATP: the fraction removed grows by the same step from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from lm_calib_plugin.pruning.allocations.base import Allocation, LayerFacts, block_numbers
from lm_calib_plugin.pruning.parts import Score

RANGE = 0.16  # between the first and the last block, as between the extremes of OWL


@dataclass(frozen=True)
class ATP(Allocation):
    """Arithmetic progression ``s_l = s + beta * (l - (L + 1) / 2)`` (Huang et al.).

    Needs no data. The paper searches ``beta`` by perplexity.

    Parameters
    ----------
    beta
        Step from block to block; not given: 0.16 between the first and the last block.
    """

    beta: float | None = None

    paper: ClassVar[str] = "https://arxiv.org/abs/2502.14770"

    def fractions(
        self, layers: Sequence[LayerFacts], sparsity: float, score: Score
    ) -> list[float | Fraction]:
        """Return one fraction for all layers of a block, growing with depth."""
        numbers = block_numbers(layers)
        beta = RANGE / max(1, len(numbers) - 1) if self.beta is None else self.beta
        middle = (len(numbers) - 1) / 2
        return [sparsity + beta * (numbers.index(layer.block) - middle) for layer in layers]
