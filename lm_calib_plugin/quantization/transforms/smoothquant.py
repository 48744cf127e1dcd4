"""SmoothQuant: moves outliers of activations into the weights, half of the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.parts import InputScaling, Scaling
from lm_calib_plugin.quantization.transforms.errors import weight_error
from lm_calib_plugin.statistics import LayerStats, gram_in, ranges_in
from lm_calib_plugin.values import number

SMALLEST = 1e-5
ALPHAS = tuple(step / 20 for step in range(6, 19))
PROBES = 64


@dataclass(frozen=True)
class SmoothQuant(InputScaling):
    """Smoothing of inputs that come from a norm (Xiao et al., equation 4).

    ``s = max|X|^alpha / max|W|^(1 - alpha)`` for every channel; the maximum of the weights is that
    over all layers that read the input. Inputs are divided by ``s``, columns multiplied. (Some
    libraries double the maximum of the weights, as their range; that changes all factors alike.)

    ``alpha=auto`` tries 0.3, 0.35, ..., 0.9 and keeps the one with the smallest expected squared
    output error of the layers that read the input, see
    :func:`~lm_calib_plugin.quantization.transforms.errors.weight_error`. The error of rounded
    weights is exact for all calibration tokens; that of rounded inputs, where inputs are rounded,
    is measured on made-up rows that fill the ranges evenly: an estimate from the maxima, as the
    method itself. It is never taken to be more than the energy of the channel, which is what
    rounding to zero costs. Factors of 1 are compared with, too.

    Parameters
    ----------
    alpha
        How much of the range goes into the weights, 0 to 1, or ``auto``.
    """

    feeds: ClassVar[str] = "norm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2211.10438"
    alpha: str | float = 0.5

    def __post_init__(self) -> None:
        if self.alpha != "auto":
            need = "alpha: a number from 0 to 1, or auto"
            alpha = number(f"{self.stage}=alpha", self.alpha, need)
            if not 0 <= alpha <= 1:
                raise UserError(self.stage, f"got alpha={alpha:g}", need)
            object.__setattr__(self, "alpha", alpha)

    @property
    def statistic(self) -> str:  # type: ignore[override]
        """What has to be known of the inputs: maxima, for a search the Gram matrix, too."""
        return "gram+ranges" if self.alpha == "auto" else "ranges"

    def scales(
        self,
        weights: Sequence[Tensor],
        stats: LayerStats,
        rounded: Callable[[int, Tensor], Tensor],
        activations: Callable[[Tensor], Tensor] | None,
        tie: Callable[[Tensor], Tensor],
    ) -> Scaling:
        """Return the factors of the given ``alpha``, or of the best one; see the class."""
        peak = ranges_in(stats).channel_max().to(weights[0].device, torch.float32)
        inner = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
        if self.alpha != "auto":
            return Scaling(tie(smoothing(peak, inner, float(self.alpha))))
        gram, mass = gram_in(stats).to(peak.device), ranges_in(stats).mass or 1.0

        def error(s: Tensor) -> float:
            noise = None if activations is None else _noise(peak, s, gram, mass, activations)
            return weight_error(weights, s, gram, rounded, noise)

        best = torch.ones_like(peak)
        before = after = error(best)
        chosen: dict[str, float] = {}
        for alpha in ALPHAS:
            s = tie(smoothing(peak, inner, alpha))
            found = error(s)
            if found < after:
                best, after, chosen = s, found, {"alpha": alpha}
        return Scaling(best, chosen, before, after)


def smoothing(peak: Tensor, inner: Tensor, alpha: float) -> Tensor:
    """Return ``peak^alpha / inner^(1 - alpha)``, ``[in]``; 1 for channels of zeros.

    ``peak`` and ``inner`` are the largest absolute inputs and weights of each channel. A channel
    whose inputs or weights are all zero has nothing to be moved.
    """
    s = peak.pow(alpha) / inner.clamp(min=SMALLEST).pow(1 - alpha)
    return torch.where((peak > 0) & (inner > 0), s.clamp(min=SMALLEST), torch.ones_like(s))


def _noise(
    peak: Tensor,
    s: Tensor,
    gram: Tensor,
    mass: float,
    activations: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the summed squared rounding error of each channel of ``X / s``, ``[in]``.

    ``mass`` is the number of rows that ``gram`` is a sum over.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(PROBES, len(peak), generator=generator).to(peak.device) * 2 - 1
    rows = spread * (peak / s)
    measured = (activations(rows).float() - rows).square().mean(dim=0)
    energy = gram.diagonal() / s.square()
    return torch.minimum(measured * mass, energy)
