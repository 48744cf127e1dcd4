"""A score, a refinement and an allocation of one's own: three classes, three entry points.

After ``pip install ./examples/own_method`` they are arguments like any other::

    lm_eval --model calib_pruned --model_args \
        pretrained=MODEL,method=wanda,sparsity=0.6,score=kurtosis?power=2,refine=rescue,allocation=edges?less=0.2

A part is a frozen dataclass: its fields are its options, its class attributes say what it needs.
It sees one weight ``[out, in]`` in float32 and the statistics of its input; layers, devices, files
and progress are the business of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.pruning.allocations.base import Allocation, LayerFacts, block_numbers
from lm_calib_plugin.pruning.parts import Refinement, Score, Selection, Strength
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class Kurtosis(Score):
    """Wanda's score in rows with few large weights, magnitude's in others.

    ``|W_ij| * ||x_j|| ** (power * tail_i)``, where ``tail_i`` is the share of the row's squared
    norm in its largest tenth. Invented for this example.

    Parameters
    ----------
    power
        How much the inputs count.
    """

    power: float = 1.0

    statistic: ClassVar[str] = "moments"  # what is to be remembered of the inputs
    rows_independent: ClassVar[bool] = True  # a row is treated by itself
    group: ClassVar[str] = "row"  # and compared with itself only

    def __post_init__(self) -> None:
        self.at_least("power", 0)

    def scores(self, weight: Tensor, stats: LayerStats | None) -> Tensor:
        """Return the importance of every weight, ``[out, in]``."""
        assert stats is not None
        squares = weight.square().sort(dim=1, descending=True).values
        tenth = max(1, weight.shape[1] // 10)
        tail = squares[:, :tenth].sum(1, keepdim=True) / squares.sum(1, keepdim=True)
        norm = stats.energy().to(weight.device).sqrt()
        return weight.abs() * norm ** (self.power * tail)


@dataclass(frozen=True)
class Rescue(Refinement):
    """Bring back the largest removed weight of each row for the smallest kept one.

    For N:M the two have to stand in one group, so nothing is moved there, and the report says so.
    """

    rows_independent: ClassVar[bool] = True

    def refine(
        self,
        weight: Tensor,
        selection: Selection,
        stats: LayerStats | None,
        strength: Strength,
    ) -> Selection:
        """Return a selection with as many weights kept in every row."""
        if strength.n_of_m:
            return selection.but(notes=(*selection.notes, "rescue moves nothing in N:M groups"))
        size = weight.abs()
        removed = size.masked_fill(selection.keep, -1.0).max(dim=1)
        kept = size.masked_fill(~selection.keep, float("inf")).min(dim=1)
        better = removed.values > kept.values
        keep = selection.keep.clone()
        rows = torch.arange(weight.shape[0], device=weight.device)[better]
        keep[rows, removed.indices[better]] = True
        keep[rows, kept.indices[better]] = False
        # The values that a score may have found belong to its own mask.
        return selection.but(keep=keep, weight=None, solved="")


@dataclass(frozen=True)
class Edges(Allocation):
    """Remove less from the first and the last block; the others make up for it.

    Parameters
    ----------
    less
        How much less, as a fraction of the weights.
    """

    less: float = 0.1

    def fractions(
        self, layers: Sequence[LayerFacts], sparsity: float, score: Score
    ) -> list[float | Fraction]:
        """Return a fraction for every layer; the package moves them together to the budget."""
        numbers = block_numbers(layers)
        edges = (numbers[0], numbers[-1])
        return [sparsity - self.less * (layer.block in edges) for layer in layers]
