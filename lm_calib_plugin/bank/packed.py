"""Symmetric matrices, stored as their upper triangle."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric ``[n, n]`` matrix, row by row, ``[n (n+1) / 2]``."""
    return torch.cat([row[i:] for i, row in enumerate(matrix)])


def unpack(triangle: Tensor, size: int) -> Tensor:
    """Return the symmetric ``[size, size]`` matrix of an upper triangle."""
    matrix = triangle.new_zeros(size, size)
    start = 0
    for i in range(size):
        matrix[i, i:] = triangle[start : start + size - i]
        start += size - i
    lower = matrix.triu(1).t()
    return matrix + lower
