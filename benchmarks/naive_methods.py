"""One-shot pruning and quantization of one weight matrix, written from the definitions.

Plain float64, without blocking or sharing tricks and without an import from the package, to hold
faster code against. A weight is ``[rows, columns]`` = ``[outputs, inputs]``; its Gram matrix is
``X^T X`` over all calibration tokens at the input of that layer.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

DAMPING = 0.01
MASK_BLOCK = 128


# Masks: a boolean tensor, True where a weight is removed.


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest scores of each row; of equal ones, those on the left first."""
    order = scores.argsort(dim=1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order[:, :count], True)


def fraction_of(total: int, sparsity: float) -> int:
    """Exact ``floor(total * sparsity)``, with the sparsity as it is written in decimals."""
    return int(total * Fraction(str(sparsity)))


def smallest_of_all(scores: Tensor, sparsity: float) -> Tensor:
    """Mark the smallest scores of the whole matrix, ties by row and then by column."""
    mask = smallest(scores.reshape(1, -1), fraction_of(scores.numel(), sparsity))
    return mask.reshape(scores.shape)


def smallest_of_row(scores: Tensor, sparsity: float) -> Tensor:
    """Mark the smallest scores of each row."""
    return smallest(scores, fraction_of(scores.shape[1], sparsity))


def n_of_m(scores: Tensor, keep: int, group: int) -> Tensor:
    """Mark all but the `keep` largest scores in each `group` consecutive columns of a row."""
    rows, columns = scores.shape
    if columns % group:
        raise ValueError(f"{columns} columns cannot be cut in groups of {group}")
    grouped = scores.reshape(rows * columns // group, group)
    return smallest(grouped, group - keep).reshape(rows, columns)


# Pruning.


def magnitude(weight: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """Zero the weights of smallest absolute value, in the matrix or in each N:M group."""
    scores = weight.abs()
    mask = n_of_m(scores, *pattern) if pattern else smallest_of_all(scores, sparsity)
    return weight.masked_fill(mask, 0)


def wanda(
    weight: Tensor, square_sums: Tensor, sparsity: float, pattern: tuple[int, int] | None
) -> Tensor:
    """Zero the weights of smallest ``|w_ij| * ||x_j||_2``, per row or in each N:M group."""
    scores = weight.abs() * square_sums.sqrt()
    mask = n_of_m(scores, *pattern) if pattern else smallest_of_row(scores, sparsity)
    return weight.masked_fill(mask, 0)


def damped(gram: Tensor) -> Tensor:
    """Set dead diagonal entries to 1, then add `DAMPING` times the mean diagonal."""
    gram = gram.double().clone()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return gram


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular ``U`` with ``U^T U`` the inverse of a positive definite matrix."""
    inverse = torch.linalg.inv(gram)
    return torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)


def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float, pattern: tuple[int, int] | None
) -> Tensor:
    """Prune column by column, moving each error into the columns on its right.

    The mask of a group of columns (128, or M of an N:M pattern) is chosen when the sweep arrives
    there, from the weights as updated so far, by ``w_ij^2 / U_jj^2`` and over all rows together
    (N:M: per row). A column that is never active has score 0.
    """
    factor = inverse_factor(damped(gram))
    dead = gram.diagonal() == 0
    work = weight.double().clone()
    columns = weight.shape[1]
    width = pattern[1] if pattern else MASK_BLOCK
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        scores = work[:, start:stop].square() / factor.diagonal()[start:stop].square()
        scores[:, dead[start:stop]] = 0
        mask = n_of_m(scores, *pattern) if pattern else smallest_of_all(scores, sparsity)
        for j in range(start, stop):
            error = torch.where(mask[:, j - start], work[:, j], 0.0) / factor[j, j]
            work[:, j:] -= torch.outer(error, factor[j, j:])
            work[mask[:, j - start], j] = 0  # exactly, not up to rounding
    return work.to(weight.dtype)


# Quantization.


def grid(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every weight, one pair per row and group of columns.

    Returns
    -------
    scale, zero : Tensor
        Float64 of the shape of `weight`; `zero` is the integer level that stands for 0.
    """
    scales, zeros = [], []
    for group in weight.double().split(group_size, dim=1):
        if symmetric:
            scale = group.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
        else:
            low = group.amin(1, keepdim=True).clamp(max=0)
            high = group.amax(1, keepdim=True).clamp(min=0)
            scale = (high - low) / (2**bits - 1)
        scale = torch.where(scale == 0, 1.0, scale)
        if symmetric:
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            zero = (-low / scale).round().clamp(0, 2**bits - 1)
        scales.append(scale.expand_as(group))
        zeros.append(zero.expand_as(group))
    return torch.cat(scales, 1), torch.cat(zeros, 1)


def to_grid(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Replace each weight by the nearest of the ``2^bits`` values of its grid."""
    level = ((weight / scale).round() + zero).clamp(0, 2**bits - 1)
    return (level - zero) * scale


def rtn(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """Round every weight to the nearest value of its grid."""
    scale, zero = grid(weight, bits, group_size, symmetric)
    return to_grid(weight.double(), scale, zero, bits).to(weight.dtype)


def gptq(
    weight: Tensor, gram: Tensor, bits: int, group_size: int, symmetric: bool, act_order: bool
) -> Tensor:
    """Round column by column, moving each error into the columns not yet visited.

    The grid is fixed first, from the original weight in its original column order. Columns are
    visited by descending diagonal of the Gram matrix, or from left to right.
    """
    scale, zero = grid(weight, bits, group_size, symmetric)
    gram = damped(gram)
    columns = weight.shape[1]
    order = torch.arange(columns)
    if act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(gram[order][:, order])
    work = weight.double()[:, order]
    scale, zero = scale[:, order], zero[:, order]
    result = torch.empty_like(work)
    for j in range(columns):
        result[:, j] = to_grid(work[:, j], scale[:, j], zero[:, j], bits)
        error = (work[:, j] - result[:, j]) / factor[j, j]
        work[:, j:] -= torch.outer(error, factor[j, j:])
    return result[:, order.argsort()].to(weight.dtype)
