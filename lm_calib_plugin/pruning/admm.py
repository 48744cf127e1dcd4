"""What the methods that alternate directions share: a Gram matrix of unit diagonal, and inverses.

``min_V ||X W^T - X V^T||^2`` over weights ``V`` with few non-zeros is split into a ridge problem
and a choice of the largest entries (alternating direction method of multipliers, ADMM). Both
steps are done on weights times the norms of their inputs, so that all columns are on one scale.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.statistics import LayerStats, cholesky_factors, gram_in


@dataclass(frozen=True)
class UnitGram:
    """``D^-1 G D^-1`` with a diagonal of ones, ``[in, in]``, and ``norm``, the diagonal of ``D``.

    ``dead`` marks input channels without any energy, ``[in]``: they are decoupled from the others,
    and what stands in front of them counts as zero.
    """

    matrix: Tensor
    norm: Tensor
    dead: Tensor

    def scaled(self, weight: Tensor) -> Tensor:
        """Return ``W D``, zero in front of silent inputs, ``[out, in]``."""
        return (weight * self.norm).masked_fill(self.dead, 0.0).contiguous()

    def restored(self, scaled: Tensor, weight: Tensor) -> Tensor:
        """Undo :meth:`scaled`; in front of silent inputs stands ``weight``, ``[out, in]``."""
        return torch.where(self.dead, weight, scaled / self.norm)


def unit_gram(stats: LayerStats | None, device: torch.device, ridge: float = 0.0) -> UnitGram:
    """Return the Gram matrix of a layer's inputs, scaled to unit diagonal.

    Parameters
    ----------
    stats
        Statistics that hold a Gram matrix.
    device
        Where the weight is.
    ridge
        Added to the diagonal before scaling, relative to its mean.
    """
    matrix = gram_in(stats).to(device, copy=True)
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    diagonal += ridge * diagonal.mean()
    diagonal[dead] = 1.0
    norm = diagonal.sqrt()
    matrix /= norm
    matrix /= norm[:, None]
    matrix.diagonal().fill_(1.0)
    return UnitGram(matrix, norm, dead)


def inverse(matrix: Tensor, shift: float) -> Tensor:
    """Return ``(matrix + shift * I)^-1``, ``[in, in]``, float32.

    By Cholesky factorization in float32; in float64 where that is not enough.

    Parameters
    ----------
    matrix
        ``[in, in]``, float32, symmetric positive semi-definite, of unit diagonal.
    shift
        Added to the diagonal, positive.

    Raises
    ------
    NumericalError
        When the matrix is not positive definite in float64, either.
    """
    for lower in cholesky_factors(matrix, shift):
        found = torch.cholesky_inverse(lower).float()
        # Smallest and largest element tell of every NaN and Inf, faster than a look at each.
        if all(bool(extreme.isfinite()) for extreme in found.aminmax()):
            return found
    raise NumericalError(
        "Gram matrix", "inverse", f"not positive definite even with {shift:g} more", "raise damp"
    )


class Inverses:
    """The inverses of one matrix with several shifts, ``(matrix + shift I)^-1``, as asked for.

    ``matrix`` is ``[in, in]``, of unit diagonal; searches that share it share its inverses.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._known: dict[float, Tensor] = {}

    def times_shift(self, shift: float) -> Tensor:
        """Return ``shift (matrix + shift I)^-1``, ``[in, in]``; not to be changed."""
        if shift not in self._known:
            self._known[shift] = inverse(self.matrix, shift).mul_(shift)
        return self._known[shift]

    def only(self, shifts: Collection[float]) -> None:
        """Forget all others."""
        self._known = {shift: found for shift, found in self._known.items() if shift in shifts}


class Splitting:
    """ADMM at a constant penalty (Boza, arXiv 2401.02938, algorithm 1).

    ``W`` minimizes the error plus ``rho/2 ||W - Z + U||^2``, ``Z`` is ``W + U`` on the mask and
    zero elsewhere, ``U`` adds up ``W - Z``. All are ``[out, in]``, on the scale of unit inputs.

    Parameters
    ----------
    matrix
        ``[in, in]``, of unit diagonal.
    dense
        The dense weight on that scale, where ``W`` starts.
    damp
        Added to the diagonal of the matrix.
    rho
        Penalty.
    """

    def __init__(self, matrix: Tensor, dense: Tensor, damp: float, rho: float) -> None:
        self.rho = rho
        self.target = torch.add(dense @ matrix, dense, alpha=damp)
        self.inverse = inverse(matrix, damp + rho)
        self.values = dense.clone()

    def step(self, keep: Tensor) -> None:
        """Do one iteration on a mask; ``values``, ``W + U``, are then the weights on it."""
        kept = self.values * keep
        dual = self.values.sub_(kept)
        right = torch.add(self.target, kept.sub_(dual), alpha=self.rho)
        self.values = torch.addmm(dual, right, self.inverse)


def solved_by(rho: float, steps: int) -> str:
    """Return the name of what :class:`Splitting` arrives at."""
    return f"admm?rho={rho:g}&steps={steps}"
