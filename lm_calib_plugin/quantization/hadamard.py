"""Orthogonal matrices whose elements are all about equally large, of any size."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Larger Sylvester matrices are applied as products of this size, 64.
SYLVESTER_POWER = 6


@dataclass(frozen=True, eq=False)
class Hadamard:
    """A random orthogonal matrix ``[n, n]`` that spreads every channel over all others.

    ``diag(signs) (core x S) / sqrt(2^power)`` with the Sylvester matrix ``S`` of size
    ``2^power`` and random signs. ``core`` is orthogonal: a Hadamard matrix over the square root of
    its size where one can be built, so that all elements are ``+-1 / sqrt(n)``, and a random
    orthogonal matrix otherwise.

    Parameters
    ----------
    core
        ``[m, m]``, float64, orthogonal, with ``n = m 2^power``.
    power
        Exponent of the size of the Sylvester matrix.
    signs
        ``[n]``, float64, 1 or -1.
    exact
        Whether all elements are ``+-1 / sqrt(n)``.
    """

    core: Tensor
    power: int
    signs: Tensor
    exact: bool

    @classmethod
    def random(cls, n: int, seed: int) -> Hadamard:
        """Make the matrix of size ``n`` that belongs to a seed."""
        if n < 1:
            raise ValueError(f"expected a positive size, got {n}")
        generator = torch.Generator().manual_seed(seed % 2**63)
        signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
        for size in sorted(d for d in _divisors_by_two(n) if d in (1, 2) or d % 4 == 0):
            block = hadamard_block(size)
            if block is not None:
                power = int(math.log2(n // size))
                return cls(block / math.sqrt(size), power, signs, exact=True)
        odd = min(_divisors_by_two(n))
        normal = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(normal)
        # With this choice of signs, q is distributed evenly over all orthogonal matrices.
        return cls(q * r.diagonal().sign(), int(math.log2(n // odd)), signs, exact=False)

    @property
    def size(self) -> int:
        """Number of rows and columns."""
        return len(self.signs)

    def factors(self) -> list[Tensor]:
        """Return small orthogonal matrices whose Kronecker product this is, but for the signs."""
        found = [self.core]
        left = self.power
        while left:
            power = min(left, SYLVESTER_POWER)
            found.append(_sylvester(power) / 2 ** (power / 2))
            left -= power
        return found

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x @ Q`` for ``x`` of shape ``[..., n]``, float64.

        One factor after another, so that it takes far fewer steps than a product with ``Q``.
        """
        y = x.double() * self.signs.to(x.device)
        n = self.size
        for factor in reversed(self.factors()):
            size = len(factor)
            y = y.reshape(-1, n // size, size) @ factor.to(x.device)
            # The next factor belongs to what is now the last axis; after all, the first is first.
            y = y.transpose(1, 2).reshape(-1, n)
        return y.reshape(x.shape)

    def dense(self) -> Tensor:
        """Return ``Q``, ``[n, n]``, float64."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))


@functools.cache
def _sylvester(power: int) -> Tensor:
    """Return the symmetric Hadamard matrix of size ``2^power``, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power):
        matrix = torch.cat([torch.cat([matrix, matrix]), torch.cat([matrix, -matrix])], dim=1)
    return matrix


@functools.cache
def hadamard_block(n: int) -> Tensor | None:
    """Return a Hadamard matrix ``[n, n]`` of 1 and -1, float64; None if none is known here.

    For ``n`` 1 and 2, and by the two constructions of Paley (J. Math. Phys. 12, 1933) over fields
    of ``q`` elements, ``q`` an odd prime or its square: ``n = q + 1`` for ``q = 3 (mod 4)`` and
    ``n = 2 (q + 1)`` for ``q = 1 (mod 4)``.
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if n % 4:
        return None
    if (n - 1) % 4 == 3 and _characters(n - 1) is not None:
        return _bordered(n - 1, -1.0) + torch.eye(n, dtype=torch.float64)
    if (n // 2 - 1) % 4 == 1 and _characters(n // 2 - 1) is not None:
        inner = _bordered(n // 2 - 1, 1.0)
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        two = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        eye = torch.eye(n // 2, dtype=torch.float64)
        return torch.kron(inner, one) + torch.kron(eye, two)
    return None


def _bordered(q: int, corner: float) -> Tensor:
    """Return the matrix of differences of a field with a border of ones; zero diagonal.

    It is symmetric for ``q = 1 (mod 4)`` and, with a border of the other sign below
    (``corner`` -1), antisymmetric for ``q = 3 (mod 4)``.
    """
    inner = _characters(q)
    assert inner is not None
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = corner
    matrix[1:, 1:] = inner
    return matrix


def _characters(q: int) -> Tensor | None:
    """Return ``chi(a - b)`` for all elements of the field of ``q``; None if ``q`` is not allowed.

    ``chi`` is 1 for squares, -1 for other elements and 0 for zero. The field of ``p^2`` elements
    is that of ``x + y sqrt(g)``, ``g`` no square modulo ``p``: there an element is a square if and
    only if its norm ``x^2 - g y^2`` is one modulo ``p``.
    """
    root = math.isqrt(q)
    if _is_odd_prime(q):
        values = torch.arange(q)
        return _legendre(q)[(values[:, None] - values) % q]
    if root * root == q and _is_odd_prime(root):
        legendre = _legendre(root)
        g = int((legendre == -1).nonzero()[0])
        x = torch.arange(q) // root
        y = torch.arange(q) % root
        dx, dy = (x[:, None] - x) % root, (y[:, None] - y) % root
        return legendre[(dx * dx - g * dy * dy) % root]
    return None


def _legendre(p: int) -> Tensor:
    """Return 1 for squares modulo an odd prime, -1 for others, 0 for 0; ``[p]``, float64."""
    found = torch.full((p,), -1.0, dtype=torch.float64)
    found[torch.arange(1, p) ** 2 % p] = 1.0
    found[0] = 0.0
    return found


def _is_odd_prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _divisors_by_two(n: int) -> list[int]:
    """Return ``n``, ``n / 2``, ``n / 4``, ... as far as they are whole."""
    found = [n]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found
