"""A fraction for every block, as listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.pruning.allocations.base import Allocation, LayerFacts, block_numbers
from lm_calib_plugin.pruning.parts import Score


@dataclass(frozen=True)
class Listed(Allocation):
    """The fraction removed from each block, one number a block.

    Parameters
    ----------
    fractions_
        Typed ``fractions=0.5+0.6+0.7``; in YAML a list.
    """

    fractions_: tuple[float, ...] = ()

    keeps_budget: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.fractions_:
            raise UserError(
                "allocation",
                "`list` without fractions",
                "the fraction removed from each block",
                "for instance allocation=list?fractions=0.4+0.5+0.6",
            )
        for value in self.fractions_:
            if not 0 <= value < 1:
                raise UserError(
                    "allocation", f"got {value:g} in fractions", "fractions removed, 0 <= s < 1"
                )

    def fractions(
        self, layers: Sequence[LayerFacts], sparsity: float, score: Score
    ) -> list[float | Fraction]:
        """Return the number of each layer's block."""
        numbers = block_numbers(layers)
        if len(numbers) != len(self.fractions_):
            raise UserError(
                "allocation",
                f"got {len(self.fractions_)} fractions for {len(numbers)} blocks",
                "one fraction for every block that holds a targeted layer",
            )
        return [self.fractions_[numbers.index(layer.block)] for layer in layers]
