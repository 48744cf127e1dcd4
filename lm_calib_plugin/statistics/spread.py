"""Mean and variance of every input channel, also within sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from lm_calib_plugin.statistics.base import LayerStats
from lm_calib_plugin.statistics.gram import Gram
from lm_calib_plugin.statistics.moments import Moments


class Spread(Moments):
    """Sums, sums of squares, and what of the squares lies within sequences; float64.

    ``mass`` is the sum of the weights of the rows (their number when none are given).
    """

    numbers = ("tokens", "mass", "sequences")

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.sums = torch.zeros_like(self.sum_squares)
        # Sum over sequences of (sum of the sequence)^2 / (its number of rows).
        self.between = torch.zeros_like(self.sum_squares)
        self.mass = 0.0
        # A number of sequences; part of one when statistics were scaled.
        self.sequences = 0.0

    def update(
        self, x: Tensor, weights: Tensor | None = None, owners: Tensor | None = None
    ) -> None:
        """Add input rows ``x``, ``[tokens, in]``; a sequence comes whole in one call.

        ``owners`` tells the sequence of each row; without it all rows are one sequence.
        """
        super().update(x, weights, owners)
        if not x.shape[0]:
            return
        rows = x.detach().to(self.device, torch.float64)
        one = torch.ones(rows.shape[0], dtype=torch.float64, device=self.device)
        mass = one if weights is None else weights.to(one)
        self.sums += (rows * mass[:, None]).sum(0)
        self.mass += float(mass.sum())
        owner = torch.zeros_like(one, dtype=torch.long)
        if owners is not None:
            owner = torch.unique(owners.to(self.device), return_inverse=True)[1]
        count = int(owner.max()) + 1
        total = torch.zeros(count, self.in_features, dtype=torch.float64, device=self.device)
        total.index_add_(0, owner, rows * mass[:, None])
        size = torch.zeros(count, dtype=torch.float64, device=self.device)
        size.index_add_(0, owner, mass)
        self.between += (total.square() / size.clamp_min(1e-300)[:, None]).sum(0)
        self.sequences += count

    def _add(self, x: Tensor) -> None:
        # In float64, as the sums: a variance is what is left of both.
        self.sum_squares += x.double().square().sum(dim=0)

    def _join(self, other: Self) -> None:
        super()._join(other)
        self.sums += other.sums.to(self.device)
        self.between += other.between.to(self.device)
        self.mass += other.mass
        self.sequences += other.sequences

    def _divide(self, factors: Tensor) -> None:
        LayerStats._divide(self, factors)

    def mean(self) -> Tensor:
        """Return the mean of each channel, ``[in]``, float32; zeros if no token was seen."""
        return (self.sums / max(self.mass, 1e-300)).float()

    def variance(self) -> Tensor:
        """Return the variance of each channel, ``[in]``, float32; ones if no token was seen."""
        if not self.tokens:
            return torch.ones(self.in_features, device=self.device)
        mean = self.sums / self.mass
        return (self.sum_squares / self.mass - mean.square()).clamp_min(0).float()

    def variance_within(self) -> Tensor:
        """Return the variance within sequences, averaged over tokens, ``[in]``, float32."""
        if not self.tokens:
            return torch.ones(self.in_features, device=self.device)
        return ((self.sum_squares - self.between) / self.mass).clamp_min(0).float()


class GramSpread(Gram):
    """The Gram matrix, and beside it mean and variance of the same rows."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.spread = Spread(in_features, device)

    def update(
        self, x: Tensor, weights: Tensor | None = None, owners: Tensor | None = None
    ) -> None:
        """Add input rows; see :meth:`Spread.update`."""
        super().update(x, weights, owners)
        self.spread.update(x, weights, owners)

    def _join(self, other: Self) -> None:
        super()._join(other)
        self.spread.merge(other.spread)

    def _divide(self, factors: Tensor) -> None:
        LayerStats._divide(self, factors)


def spread_in(stats: LayerStats | None) -> Spread:
    """Return the mean and variance that statistics hold.

    Raises
    ------
    ValueError
        When they hold none.
    """
    if isinstance(stats, GramSpread):
        return stats.spread
    if not isinstance(stats, Spread):
        raise ValueError("mean and variance of the inputs are needed")
    return stats
