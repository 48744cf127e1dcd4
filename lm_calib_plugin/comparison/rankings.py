"""Rank correlations, and how well the ranking of one draw tells that of the mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lm_calib_plugin.comparison.numbers import (
    RESAMPLES,
    Array,
    Interval,
    differences,
    finite,
    percentile_interval,
)
from lm_calib_plugin.comparison.pairs import probability_better_normal
from lm_calib_plugin.errors import UserError


def spearman(a: ArrayLike, b: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return Spearman's rank correlation of pairs, with the bootstrap interval over pairs.

    A resample in which one side is constant ranks nothing and counts as 0.
    """
    return _correlation(lambda x, y: float(stats.spearmanr(x, y).statistic), a, b, resamples, seed)


def kendall_tau_b(
    a: ArrayLike, b: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return Kendall's tau-b of pairs, with the bootstrap interval over pairs.

    A resample in which one side is constant ranks nothing and counts as 0.
    """
    return _correlation(lambda x, y: float(stats.kendalltau(x, y).statistic), a, b, resamples, seed)


def expected_tau(draws: Sequence[ArrayLike], resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Return the expected tau-b of a ranking from one draw against that of the mean scores.

    Each resample takes one draw of every entry, independently.

    Parameters
    ----------
    draws
        The scores of each entry (source, method), at least two entries; numbers of draws may
        differ.
    """
    return one_draw_tau(draws, resamples, seed).value


def one_draw_tau(draws: Sequence[ArrayLike], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return :func:`expected_tau` and the bounds of 95 % of the rankings from one draw.

    ``low`` and ``high`` are percentiles of the tau-b of one ranking, not an error of the mean:
    they say what someone with a single draw may see.
    """
    entries, sampled = _one_draw_each(draws, resamples, seed)
    reference = _pair_signs(np.array([[scores.mean() for scores in entries]]))
    taus = _tau_b(_pair_signs(sampled), _ranked(reference))
    return percentile_interval(float(taus.mean()), taus)


def rank_stability(
    draws: Sequence[ArrayLike],
    higher_is_better: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Array:
    """Return how often an entry takes a rank when one draw of every entry is taken.

    Parameters
    ----------
    draws
        The scores of each entry, at least two entries; numbers of draws may differ.

    Returns
    -------
    ``[entries, ranks]``, the best rank first. Entries that tie share their ranks equally, so rows
    and columns sum to 1.
    """
    _, sampled = _one_draw_each(draws, resamples, seed)
    signs = np.sign(sampled[:, None, :] - sampled[:, :, None])  # of the others, against each
    ahead = ((signs > 0) if higher_is_better else (signs < 0)).sum(2)[..., None]
    tied = (signs == 0).sum(2)[..., None]  # itself among them
    ranks = np.arange(len(draws))
    taken = ((ranks >= ahead) & (ranks < ahead + tied)) / tied
    return np.asarray(taken.mean(0), dtype=np.float64)


def tau_between(scores: ArrayLike) -> Array:
    """Return tau-b between the rankings of every two columns, such as tasks, models or levels.

    Parameters
    ----------
    scores
        ``[entries, columns]``, at least two entries; columns that all point the same way (negate
        those where less is better).

    Returns
    -------
    ``[columns, columns]``, symmetric, 1 on the diagonal; NaN for a column whose entries all tie, as
    it ranks nothing.
    """
    signs = _pair_signs(finite("scores", scores, 2, least=2).T)
    norm = np.sqrt(np.count_nonzero(signs, 1))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.clip(signs @ signs.T / norm[:, None] / norm, -1, 1))


def expected_tau_normal(means: ArrayLike, sds: ArrayLike) -> float:
    """Return what :func:`expected_tau` tends to for normal draws, from their summaries.

    Exact, nothing is simulated: draws have no ties, so tau-b is linear in the signs of the pairs
    and the expectation of a sign is ``2 P(i > j) - 1``. With every ``sd`` 0 the ranking is that of
    the means.

    Parameters
    ----------
    means, sds
        ``[entries]``.
    """
    centers, spread = finite("means", means, 1, least=2), finite("sds", sds, 1, least=2)
    reference = _ranked(_pair_signs(centers[None]))[0]
    i, j = np.triu_indices(len(centers), 1)
    chances = [
        probability_better_normal(centers[x], spread[x], centers[y], spread[y])
        for x, y in zip(i, j, strict=True)
    ]
    signs = 2 * np.array(chances) - 1
    # Only ties that no draw can break (no spread at all) are ties of the draws too.
    never = (signs == 0) & (np.hypot(spread[i], spread[j]) == 0)
    norm = math.sqrt(np.count_nonzero(reference) * np.count_nonzero(~never))
    return float((signs * reference).sum() / norm)


def _correlation(
    statistic: Callable[[Array, Array], float],
    a: ArrayLike,
    b: ArrayLike,
    resamples: int,
    seed: int,
) -> Interval:
    differences("a", a, b, 1)
    x, y = finite("a", a, 1, least=2), finite("b", b, 1, least=2)
    for name, side in (("a", x), ("b", y)):
        if np.ptp(side) == 0:
            raise UserError(name, "all values are equal", "equal values rank nothing")
    rng = np.random.default_rng(seed)
    found = np.zeros(resamples)
    for number in range(resamples):
        taken = rng.integers(len(x), size=len(x))
        if np.ptp(x[taken]) and np.ptp(y[taken]):
            found[number] = statistic(x[taken], y[taken])
    return percentile_interval(statistic(x, y), found)


def _one_draw_each(
    draws: Sequence[ArrayLike], resamples: int, seed: int
) -> tuple[list[Array], Array]:
    """Return the scores of the entries, and one of each, ``[resamples, entries]``."""
    entries = [finite("draws", scores, 1) for scores in draws]
    rng = np.random.default_rng(seed)
    return entries, np.stack([rng.choice(scores, resamples) for scores in entries], 1)


def _pair_signs(scores: Array) -> Array:
    """Return the signs of all pairs, ``[rankings, pairs]``, of scores ``[rankings, entries]``."""
    i, j = np.triu_indices(scores.shape[1], 1)
    return np.asarray(np.sign(scores[:, i] - scores[:, j]))


def _ranked(signs: Array) -> Array:
    if not signs.any():
        raise UserError("scores", "all means are equal", "two entries that differ are needed")
    return signs


def _tau_b(signs: Array, reference: Array) -> Array:
    """Return tau-b of each row of pair signs; a row of ties only counts as 0."""
    norm = np.sqrt(np.count_nonzero(signs, 1) * np.count_nonzero(reference))
    return np.asarray((signs * reference).sum(1) / np.where(norm > 0, norm, 1.0))
