"""Gram matrix of the inputs, ``G = X^T X``: the quadratic form of the layer's output error."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import Self

from lm_calib_plugin.statistics.base import LayerStats

# Columns that are multiplied at once; of the products of a pair of tiles only one is formed. The
# first divides the second.
TILE, GPU_TILE = 256, 2048
HALF = (torch.float16, torch.bfloat16)


class Gram(LayerStats):
    """Sum of ``x x^T`` over the input rows, float32.

    ``tr(D G D^T)`` is the squared output error of a weight change ``D`` on the tokens seen.
    The sum, not the mean, is kept: masks and updates do not depend on the scale of ``G``.

    The matrix is symmetric, so only tiles on and above its diagonal are summed, about half of the
    work of the whole product; the rest is filled in when the matrix is asked for. Rows of 16 bits
    on a CUDA device are multiplied as they are: their products are exact in float32, in which they
    are summed.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        shape = in_features, in_features
        self._sums = torch.zeros(shape, dtype=torch.float32, device=self.device)
        # Whether the tiles below the diagonal are those above it, mirrored.
        self._whole = True

    @property
    def matrix(self) -> Tensor:
        """``G``, ``[in, in]``; not a copy."""
        if not self._whole:
            # By the smallest tiles: the sums may have come from another device.
            for own in self._tiles(TILE):
                self._sums[own.stop :, own] = self._sums[own, own.stop :].t()
            self._whole = True
        return self._sums

    @matrix.setter
    def matrix(self, value: Tensor) -> None:
        self._sums, self._whole = value, True

    def _tiles(self, size: int = 0) -> list[slice]:
        size = size or (GPU_TILE if self.device.type == "cuda" else TILE)
        width = self.in_features
        return [slice(at, min(at + size, width)) for at in range(0, width, size)]

    def _read(self, x: Tensor, weights: Tensor | None) -> Tensor:
        if weights is None and x.dtype in HALF and self.device.type == "cuda":
            return x.to(self.device)
        return super()._read(x, weights)

    def _add(self, x: Tensor) -> None:
        for own in self._tiles():
            sums, left, right = self._sums[own, own.start :], x[:, own].t(), x[:, own.start :]
            if x.dtype in HALF:
                sums += torch.mm(left, right, out_dtype=torch.float32)
            else:
                sums.addmm_(left, right)
        self._whole = len(self._tiles()) == 1

    def live(self) -> Iterator[tuple[Tensor, bool]]:
        """Yield the tiles on and above the diagonal; see :meth:`LayerStats.live`."""
        self._whole = len(self._tiles()) == 1
        for own in self._tiles():
            yield self._sums[own, own.start :], False

    def _join(self, other: Self) -> None:
        self.matrix.add_(other.matrix.to(self.device))

    def _divide(self, factors: Tensor) -> None:
        self.matrix = self.matrix / torch.outer(factors, factors).to(self._sums)

    def is_finite(self) -> bool:
        """Tell whether nothing seen so far was NaN or infinite."""
        # A NaN or Inf in any input channel reaches that channel's diagonal element.
        return bool(self._sums.diagonal().isfinite().all())

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
