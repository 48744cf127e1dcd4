"""What an allocation sees, and how fractions become exact counts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.part import Part
from lm_calib_plugin.pruning.parts import Score
from lm_calib_plugin.statistics import LayerStats

MOST = 0.99


@dataclass(frozen=True)
class LayerFacts:
    """One layer as an allocation sees it.

    ``read`` returns the dense weight, ``[out, in]`` in float32; ``stats`` are second moments of
    its input *per token*, from a pass of the dense model, None when the allocation needs none.
    """

    name: str
    block: int
    shape: tuple[int, int]
    read: Callable[[], Tensor]
    stats: LayerStats | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


class Allocation(Part):
    """Decides how much is removed from which layer.

    ``keeps_budget``: the fractions are moved together until the whole budget is met by the number
    of weights; else they are taken as they are. ``whole_layer``: a layer is one comparison group,
    and the scores of the layers are looked at.
    """

    stage: ClassVar[str] = "allocation"
    keeps_budget: ClassVar[bool] = True
    whole_layer: ClassVar[bool] = False

    @abstractmethod
    def fractions(
        self, layers: Sequence[LayerFacts], sparsity: float, score: Score
    ) -> list[float | Fraction]:
        """Return the fraction to remove from each layer.

        Parameters
        ----------
        layers
            In the order of the model.
        sparsity
            Fraction to remove from all of them together.
        score
            What will choose the weights.

        Raises
        ------
        UserError
            When it does not fit these layers or this score.
        """
        ...


def block_numbers(layers: Sequence[LayerFacts]) -> list[int]:
    """Return the numbers of the blocks that hold layers, in order, without repetition."""
    return list(dict.fromkeys(layer.block for layer in layers))


def meet_budget(
    wanted: Sequence[float], sizes: Sequence[int], sparsity: float, most: float = MOST
) -> list[float]:
    """Shift fractions together until they remove ``sparsity`` of all weights.

    Fractions stay between 0 and ``most`` (or ``sparsity``, if that is more); the shift is found
    by bisection.

    Returns
    -------
    list
        ``min(max(w + t, 0), most)`` for the one ``t`` that meets the budget.
    """
    most = max(most, sparsity)

    def clipped(shift: float) -> list[float]:
        return [min(max(w + shift, 0.0), most) for w in wanted]

    budget = sparsity * sum(sizes)
    low, high = -1.0 - max(wanted), 1.0 - min(wanted)
    for _ in range(100):
        middle = (low + high) / 2
        removed = sum(f * n for f, n in zip(clipped(middle), sizes, strict=True))
        low, high = (middle, high) if removed < budget else (low, middle)
    return clipped((low + high) / 2)


def apportion(
    wanted: Sequence[float], units: Sequence[int], total: int, most: Sequence[int]
) -> list[int]:
    """Round counts so that ``sum(count * unit)`` comes as near to ``total`` as it can from below.

    Every count is rounded down; what is missing goes, one each, to the largest remainders.

    Parameters
    ----------
    wanted
        Real counts.
    units
        Weights that one more of a count removes.
    total
        Weights to remove.
    most
        Largest count of each.
    """
    # Whole numbers may come with the rounding of the arithmetic before.
    counts = [min(int(w + 1e-9), m) for w, m in zip(wanted, most, strict=True)]
    missing = total - sum(c * u for c, u in zip(counts, units, strict=True))
    order = sorted(range(len(counts)), key=lambda i: counts[i] - wanted[i])
    for i in reversed(order):
        if missing < 0 and counts[i]:
            counts[i] -= 1
            missing += units[i]
    for i in order:
        if units[i] <= missing and counts[i] < most[i]:
            counts[i] += 1
            missing -= units[i]
    return counts
