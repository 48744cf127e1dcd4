"""Second moment of every input channel: the diagonal of the Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from lm_calib_plugin.statistics.base import LayerStats


class Moments(LayerStats):
    """Sum of squares of each input channel.

    Squares are formed in float32 and summed over chunks in float64, so that the order and size of
    the chunks hardly matter.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.sum_squares = torch.zeros(in_features, dtype=torch.float64, device=self.device)

    def _add(self, x: Tensor) -> None:
        self.sum_squares += x.square().sum(dim=0)

    def _join(self, other: Self) -> None:
        self.sum_squares += other.sum_squares.to(self.device)

    def _divide(self, factors: Tensor) -> None:
        self.sum_squares = self.sum_squares / factors.double().square()

    def is_finite(self) -> bool:
        """Tell whether nothing seen so far was NaN or infinite."""
        return bool(self.sum_squares.isfinite().all())

    def per_token(self) -> Moments:
        """Return the moments of one average token; unseen inputs stay unseen."""
        one = Moments(self.in_features, self.device)
        if self.tokens:
            one.sum_squares = self.sum_squares / self.tokens
            one.tokens = 1
        return one

    def energy(self) -> Tensor:
        """Return ``sum_t x_tj^2``, shape ``[in]``, float32; ones if no token was seen."""
        if not self.tokens:
            return torch.ones(self.in_features, device=self.device)
        return self.sum_squares.float()
