"""AWQ: larger weights, and so finer rounding, for the input channels that carry most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.quantization.parts import InputScaling, Scaling
from lm_calib_plugin.quantization.transforms.errors import weight_error
from lm_calib_plugin.statistics import LayerStats, gram_in, ranges_in

SMALLEST = 1e-4


@dataclass(frozen=True)
class AWQ(InputScaling):
    """Activation-aware scaling of input channels (Lin et al., section 3.2).

    ``s = mean|X|^r``, with ``duo`` divided by ``w^(1-r)``, where ``w`` is the mean over all rows of
    ``|W|``, each row relative to its largest element. ``s`` is divided by the geometric mean of its
    largest and smallest element. Of all ``r`` in ``0, 1/steps, ...`` below 1 the one is kept with
    the smallest error of equation 4, ``||Q(W s) s^-1 X - W X||^2``, summed over the layers that
    read the input. It is computed for all calibration tokens at once as ``tr(D G D^T)`` with
    ``D = Q(W s) / s - W`` and the Gram matrix ``G`` of the input, without a forward pass; the
    authors' code compares outputs of the whole attention or MLP on a sample instead. Factors of 1
    are always compared with, so this error is never larger than that of plain rounding.

    Quantized activations are not looked at: the method is for weights alone.

    Parameters
    ----------
    steps
        Number of exponents that are tried.
    duo
        Whether the size of the weights counts, too.
    """

    statistic: ClassVar[str] = "gram+ranges"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.00978"
    steps: int = 20
    duo: bool = True

    def __post_init__(self) -> None:
        self.at_least("steps", 1)

    def scales(
        self,
        weights: Sequence[Tensor],
        stats: LayerStats,
        rounded: Callable[[int, Tensor], Tensor],
        activations: Callable[[Tensor], Tensor] | None,
        tie: Callable[[Tensor], Tensor],
    ) -> Scaling:
        """Return the factors with the smallest squared output error; see the class."""
        gram = gram_in(stats).to(weights[0].device)
        best = torch.ones_like(weights[0][0])
        before = after = weight_error(weights, best, gram, rounded)
        chosen: dict[str, float] = {}
        for r, s in self._candidates(weights, ranges_in(stats).mean_abs()):
            s = tie(s)
            error = weight_error(weights, s, gram, rounded)
            if error < after:
                best, after, chosen = s, error, {"r": r}
        return Scaling(best, chosen, before, after)

    def _candidates(
        self, weights: Sequence[Tensor], size: Tensor
    ) -> Iterator[tuple[float, Tensor]]:
        size = size.to(weights[0].device, torch.float32)
        inner = _relative_size(weights)
        for step in range(self.steps):
            r = step / self.steps
            s = size.pow(r)
            if self.duo:
                s = s / inner.pow(1 - r).clamp(min=SMALLEST)
            s = s.clamp(min=SMALLEST)
            yield r, s / (s.max() * s.min()).sqrt()


def _relative_size(weights: Sequence[Tensor]) -> Tensor:
    """Return the mean of ``|w|`` of every column, each row relative to its largest; ``[in]``."""
    total = torch.zeros_like(weights[0][0])
    for weight in weights:
        size = weight.abs()
        total += (size / size.amax(dim=1, keepdim=True).clamp(min=1e-30)).sum(dim=0)
    return total / sum(len(weight) for weight in weights)
