"""Symmetric matrices, stored as their upper triangle."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_GATHERED = 4096  # widest matrix for which the places of all elements are remembered (64 MiB)
_TILE = 128


def pack(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric ``[n, n]`` matrix, row by row, ``[n (n+1) / 2]``."""
    return torch.cat([row[i:] for i, row in enumerate(matrix)])


def unpack(triangle: Tensor, size: int) -> Tensor:
    """Return the symmetric ``[size, size]`` matrix of an upper triangle."""
    if size <= _GATHERED:
        places = _places(size).to(triangle.device)
        return triangle.index_select(0, places).view(size, size)
    matrix = triangle.new_zeros(size, size)
    for i, row in enumerate(triangle.split(list(range(size, 0, -1)))):
        matrix[i, i:] = row
    # Tile by tile: a transposed copy of the whole would take the memory of a second matrix.
    for start in range(0, size, _TILE):
        stop = min(start + _TILE, size)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].t()
        corner = matrix[start:stop, start:stop]
        corner += corner.triu(1).t()
    return matrix


@lru_cache(maxsize=4)
def _places(size: int) -> Tensor:
    """Return where each element of the matrix stands in the triangle, int32 ``[size * size]``."""
    count = torch.arange(size, dtype=torch.int32)
    starts = count * size - torch.div(count * (count - 1), 2, rounding_mode="floor")
    rows, columns = count[:, None], count[None, :]
    low, high = torch.minimum(rows, columns), torch.maximum(rows, columns)
    return (starts[low.long()] + high - low).reshape(-1)
