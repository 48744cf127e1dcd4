"""How alike two sets look to a layer: second moments, subspaces, outlier channels, ranges.

With ``H = X^T X / tokens`` and ``a_j`` the largest ``|x|`` of channel ``j``:

``jaccard``
    Overlap of the 1 % of channels with the largest ``a_j`` (at least one), 1 if they are the same.
``range_shift``
    Mean over channels of ``|log(a_j(A) / a_j(B))|``; channels that are 0 in one set do not count.
``energy_shift``
    Mean over channels of ``|log(r_j(A) / r_j(B))|`` with ``r_j`` the root mean square of channel
    ``j``; channels that are 0 in one set do not count.
``spearman``
    Rank correlation of ``diag(H)``.
``frobenius``
    ``||H_A - H_B||_F / ||H_A||_F``, A being the first of the two.
``angles``
    ``sqrt(1 - ||U_A^T U_B||_F^2 / k)`` for orthonormal bases of the leading k-dimensional
    subspaces: 0 the same, 1 at right angles.
``rank_share``
    ``tr(H)^2 / ||H||_F^2 / in``: the share of dimensions that ``H`` effectively has.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

TOP_SHARE = 0.01
DIMENSIONS = 16
# Up to this width all eigenvectors are computed; above, the leading ones by iteration.
_DIRECT = 128
_EXTRA, _ROUNDS, _SETTLED, _NOTHING = 16, 40, 1e-3, 1e-7


def top_channels(peak: np.ndarray, share: float = TOP_SHARE) -> set[int]:
    """Return the channels with the largest ``|x|``; of equal ones the first. Dead ones never."""
    count = max(1, math.ceil(share * len(peak) - 1e-9))
    order = np.argsort(-peak, kind="stable")[:count]
    return {int(j) for j in order if peak[j] > 0}


def by_channel(
    peak_a: np.ndarray, energy_a: np.ndarray, peak_b: np.ndarray, energy_b: np.ndarray
) -> dict[str, float | None]:
    """Compare largest values and mean squares of channels, ``[in]`` each."""
    top_a, top_b = top_channels(peak_a), top_channels(peak_b)
    union = top_a | top_b
    return {
        "jaccard": len(top_a & top_b) / len(union) if union else None,
        "range_shift": shift(peak_a, peak_b),
        "energy_shift": shift(np.sqrt(energy_a), np.sqrt(energy_b)),
        "spearman": spearman(energy_a, energy_b),
    }


def shift(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return the mean of ``|log(a / b)|`` over what is positive in both; None without any."""
    alive = (a > 0) & (b > 0)
    return float(np.abs(np.log(a[alive] / b[alive])).mean()) if alive.any() else None


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return the rank correlation, equal values sharing ranks; None where one is constant."""
    x, y = (rankdata(v) - (len(v) + 1) / 2 for v in (a, b))
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else None


def by_gram(first: Tensor, second: Tensor, k: int, seed: int = 0) -> dict[str, float | None]:
    """Compare second moments ``H`` ``[in, in]``.

    Parameters
    ----------
    k
        Dimensions of the subspaces; 0: these are not compared.
    """
    size = _norm(first)
    return {
        "frobenius": _norm(first - second) / size if size > 0 else None,
        "angles": angles(leading(first, k, seed), leading(second, k, seed)) if k else None,
    }


def dimensions(width: int, tokens_a: int, tokens_b: int) -> int:
    """Return k: 16, less where a quarter of the channels or the tokens of a set are fewer."""
    return min(DIMENSIONS, max(1, width // 4), tokens_a, tokens_b)


def rank_share(second: Tensor) -> float | None:
    """Return the effective rank of ``H`` over its size."""
    size = _norm(second)
    trace = float(second.diagonal().sum(dtype=torch.float64))
    return trace**2 / size**2 / len(second) if size > 0 else None


def angles(a: Tensor, b: Tensor) -> float:
    """Return the distance of the spans of orthonormal columns ``[in, k]``."""
    common = (a.t() @ b).double().square().sum() / a.shape[1]
    return math.sqrt(max(0.0, 1.0 - float(common)))


def leading(matrix: Tensor, k: int, seed: int = 0) -> Tensor:
    """Return the k leading eigenvectors of a symmetric matrix, ``[in, k]``, orthonormal.

    For wide matrices by iteration on a larger subspace, until every eigenvalue settles to 1e-3 of
    itself or 40 rounds are over.
    """
    width = len(matrix)
    if width <= _DIRECT:
        return torch.linalg.eigh(matrix.double())[1][:, -k:].flip(1)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(width, min(width, k + _EXTRA), generator=generator)
    base = torch.linalg.qr(start.to(matrix))[0]
    before = torch.zeros(k)
    for _ in range(_ROUNDS):
        image = matrix @ base
        values, turn = torch.linalg.eigh(base.t() @ image)
        found = (base @ turn)[:, -k:].flip(1)
        top = values[-k:].cpu()
        if bool(((top - before).abs() <= _SETTLED * top.abs() + _NOTHING * top.max()).all()):
            break
        before, base = top, torch.linalg.qr(image)[0]
    return found


def _norm(matrix: Tensor) -> float:
    return math.sqrt(float(matrix.square().sum(dtype=torch.float64)))
