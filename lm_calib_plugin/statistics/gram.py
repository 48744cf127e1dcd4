"""Gram matrix of the inputs, ``G = X^T X``: the quadratic form of the layer's output error."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from lm_calib_plugin.statistics.base import LayerStats


class Gram(LayerStats):
    """Sum of ``x x^T`` over the input rows, float32.

    ``tr(D G D^T)`` is the squared output error of a weight change ``D`` on the tokens seen.
    The sum, not the mean, is kept: masks and updates do not depend on the scale of ``G``.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.matrix = torch.zeros(in_features, in_features, device=self.device)

    def _add(self, x: Tensor) -> None:
        self.matrix.addmm_(x.t(), x)

    def _join(self, other: Self) -> None:
        self.matrix += other.matrix.to(self.device)

    def _divide(self, factors: Tensor) -> None:
        self.matrix = self.matrix / torch.outer(factors, factors).to(self.matrix)

    def is_finite(self) -> bool:
        """Tell whether nothing seen so far was NaN or infinite."""
        # A NaN or Inf in any input channel reaches that channel's diagonal element.
        return bool(self.matrix.diagonal().isfinite().all())

    def gram(self) -> Tensor:
        """Return ``G`` of shape ``[in, in]``; the identity if no token was seen."""
        if not self.tokens:
            return torch.eye(self.in_features, device=self.device)
        return self.matrix

    def energy(self) -> Tensor:
        """Return the diagonal of ``G``, shape ``[in]``; ones if no token was seen."""
        return self.gram().diagonal().clone()


def gram_in(stats: LayerStats | None) -> Tensor:
    """Return the Gram matrix that statistics hold, ``[in, in]``; not a copy.

    Raises
    ------
    ValueError
        When they hold none.
    """
    if not isinstance(stats, Gram):
        raise ValueError("the Gram matrix of the inputs is needed")
    return stats.gram()


def output_error(change: Tensor, gram: Tensor) -> float:
    """Return ``tr(D G D^T)``, the squared output error of a weight change ``D [out, in]``."""
    return float(((change @ gram.to(change)) * change).sum(dtype=torch.float64))
