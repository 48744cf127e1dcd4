"""Factor of the inverse of a damped Gram matrix, the engine of second-order methods."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lm_calib_plugin.errors import NumericalError

DAMP_CAP = 1.0
# Triangular matrices up to this size are inverted by a solve.
SMALL = 96


@dataclass(frozen=True)
class InverseFactor:
    """``upper`` is the upper triangular ``U`` with ``inv(G + damp I) = U^T U``, ``[in, in]``.

    ``damp`` is the ridge that was used, relative to the mean of the diagonal of ``G``. ``dead``
    marks input channels without any energy, ``[in]``; their diagonal element was set to 1 before
    factoring, which decouples them from the others.
    """

    upper: Tensor
    damp: float
    dead: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return int(self.upper.nbytes + self.dead.nbytes)

    def copy(self) -> InverseFactor:
        """Return a factor with tensors of its own, in the same order of memory."""
        return InverseFactor(self.upper.clone(), self.damp, self.dead.clone())


class FactorMemory(Protocol):
    """Keeps factors under names; it may forget them."""

    def recall(self, name: Hashable) -> InverseFactor | None:
        """Return a factor that nobody else changes, or None."""
        ...

    def keep(self, name: Hashable, factor: InverseFactor) -> None:
        """Keep a factor, which the caller may change afterwards."""
        ...


_MEMORY: ContextVar[FactorMemory | None] = ContextVar("lm_calib_plugin_factors", default=None)


@contextlib.contextmanager
def remembered_factors(memory: FactorMemory | None) -> Iterator[None]:
    """Let :func:`inverse_factor` compute nothing in this context that ``memory`` knows."""
    token = _MEMORY.set(memory)
    try:
        yield
    finally:
        _MEMORY.reset(token)


def inverse_factor(gram: Tensor, damp: float) -> InverseFactor:
    """Factor ``inv(G + damp * mean(diag G) * I) = U^T U``; in float64, or with more, if need be.

    See :func:`_computed`. Inside :func:`remembered_factors` a matrix on the CPU with the same bits
    is not factored again.

    Parameters
    ----------
    gram
        ``G``, shape ``[in, in]``, float32, symmetric positive semi-definite.
    damp
        Ridge relative to the mean of the diagonal.

    Raises
    ------
    NumericalError
        When the matrix can not be factored even with the largest ridge.
    """
    memory = _MEMORY.get()
    if memory is None or gram.device.type != "cpu":
        return _computed(gram, damp)
    # Reading it takes a small part of the work of factoring it, and nobody has to say which it is.
    content = hashlib.sha256(memoryview(gram.detach().contiguous().view(torch.uint8).numpy()))
    layout = gram.shape, gram.stride(), gram.dtype, torch.get_num_threads()
    name = (*layout, damp, content.digest())
    known = memory.recall(name)
    if known is None:
        known = _computed(gram, damp)
        memory.keep(name, known)
    return known


def _computed(gram: Tensor, damp: float) -> InverseFactor:
    """Return the factor, without ever forming the inverse.

    With ``F`` reversing the order of rows and columns, ``F G F = L L^T`` gives ``G = R R^T`` for
    the upper triangular ``R = F L F``, hence ``U = R^-1``: one Cholesky factorization and one
    triangular inverse. When float32 is not enough, float64 is tried with the same ridge; then the
    ridge grows tenfold up to ``1.0``. The ridge used is returned, never hidden.
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    matrix = gram.clone()
    matrix.diagonal()[dead] = 1.0
    mean = diagonal.mean()
    used, dtype = damp, torch.float32
    while True:
        upper = _factor(matrix, used * mean, dtype)
        if upper is not None:
            return InverseFactor(upper, used, dead)
        if dtype == torch.float32:
            dtype = torch.float64
        elif used < DAMP_CAP:
            used = min(DAMP_CAP, max(used * 10, 1e-4))
        else:
            raise NumericalError(
                "Gram matrix",
                "factorization",
                f"not positive definite even with damp={used:g}",
                "use more calibration tokens",
            )


def _factor(matrix: Tensor, ridge: Tensor, dtype: torch.dtype) -> Tensor | None:
    # One matrix after the other is let go: for wide layers they are what memory is needed for.
    damped = matrix.flip(0, 1).to(dtype)
    damped.diagonal().add_(ridge.to(dtype))
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if failed.item():
        return None
    root = lower.flip(0, 1)
    del lower
    upper = triangular_inverse(root).float()
    # An infinite element of the matrix leaves zeros on the diagonal of the factor. Smallest and
    # largest element tell of every NaN and Inf.
    extremes = torch.stack(upper.aminmax())
    usable = extremes.isfinite().all() & (upper.diagonal() > 0).all()
    return upper if bool(usable) else None


def triangular_inverse(upper: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix, ``[n, n]``, by halves.

    The inverse of ``[[A, B], [0, C]]`` is ``[[A', -A' B C'], [0, C']]``: products of matrices,
    which run several times as fast as a triangular solve for the identity.
    """
    size = len(upper)
    if size <= SMALL:
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, eye, upper=True)
    half = size // 2
    found = torch.zeros_like(upper)
    first = found[:half, :half] = triangular_inverse(upper[:half, :half])
    last = found[half:, half:] = triangular_inverse(upper[half:, half:])
    found[:half, half:] = (first @ upper[:half, half:] @ last).neg_()
    return found


def cholesky_factors(matrix: Tensor, shift: float = 0.0) -> Iterator[Tensor]:
    """Yield lower Cholesky factors of ``matrix + shift * I``: in float32, then in float64.

    A precision in which the matrix is not positive definite is left out.
    """
    for dtype in (torch.float32, torch.float64):
        shifted = matrix.to(dtype, copy=True)
        shifted.diagonal().add_(shift)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if not failed.item():
            yield lower
