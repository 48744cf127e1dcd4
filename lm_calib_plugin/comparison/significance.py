"""One p value for two arms: exact where it can be, and valid when draws share their items."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, signal, stats

from lm_calib_plugin.comparison.items import crossed
from lm_calib_plugin.comparison.numbers import paired_table
from lm_calib_plugin.errors import UserError


def mcnemar(beneficial: int, harmful: int) -> float:
    """Return the exact two-sided p value of McNemar's test (binomial, no mid-p).

    Parameters
    ----------
    beneficial, harmful
        Items that only one of the two arms, and only the other, got right, in one draw.
    """
    if beneficial < 0 or harmful < 0:
        raise UserError("beneficial", f"{beneficial} and {harmful}", "counts >= 0 are needed")
    fewer, both = min(beneficial, harmful), beneficial + harmful
    return min(1.0, 2 * float(stats.binom.cdf(fewer, both, 0.5)))


def sign_flip(sums: ArrayLike) -> float:
    """Return the exact two-sided p value of a sum of integers whose signs are coins.

    For numbers -1, 0 and 1 this is McNemar's test; for sums over draws of 0/1 differences it tests
    items while it keeps all draws of an item together. Below 1e-12 the number is not exact.

    Parameters
    ----------
    sums
        ``[items]``, integers.
    """
    given = np.asarray(sums)
    whole = np.rint(given).astype(np.int64)
    if given.ndim != 1 or not np.array_equal(whole, given):
        raise UserError("sums", f"got shape {given.shape}", "one row of whole numbers is needed")
    sizes, counts = np.unique(np.abs(whole[whole != 0]), return_counts=True)
    if len(sizes) < 2:
        return mcnemar(int((whole > 0).sum()), int((whole < 0).sum()))
    chances = np.ones(1)  # of the sum of the positive sizes
    for size, count in zip(sizes, counts, strict=True):
        coins = np.zeros(size * count + 1)
        coins[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.clip(signal.convolve(chances, coins), 0, None)
    totals = 2 * np.arange(len(chances)) - int((sizes * counts).sum())
    return min(1.0, float(chances[np.abs(totals) >= abs(int(whole.sum()))].sum()))


def p_value(
    a: ArrayLike,
    b: ArrayLike,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
) -> float | None:
    """Return the two-sided p value of no difference between two arms.

    One draw of each (or draws that are all equal) leaves the items: exact McNemar for 0/1 items,
    else a t test of the paired items; it says nothing about other draws. Several draws of the same
    items are not independent, so flips of different draws are never pooled as if they were.
    Instead draws and items are both taken as random, each with its error and its own t
    distribution, as Cochran and Cox do for two unequal variances: p is the level at which
    ``t(draws - 1) ** 2 * error(draws) ** 2 + t(items - 1) ** 2 * error(items) ** 2`` is the squared
    mean. That is conservative, since the noise of a draw on an item is in both errors. For 0/1
    items the larger of it and the exact sign flip of the items (draws kept together) is taken, as
    a t distribution is a poor one for few flips.

    Parameters
    ----------
    a, b
        ``[draws, items]`` or ``[draws]``, of one shape.
    weights
        ``[items]``, above 0.
    strata
        ``[items]``, the fixed block (task) of each: errors over items are then within blocks, with
        the degrees of freedom by Satterthwaite. Exact tests do not take them into account: flips
        of signs allow for all that blocks could do, so they stay valid.

    Returns
    -------
    float or None
        None where nothing can be tested: one draw, or draws that are all equal, without items.
    """
    gaps = paired_table(a, b)
    spread = crossed(gaps, weights, strata)
    if not gaps.any():
        return 1.0
    if not spread.draws:  # one draw, or draws that all agree
        gaps = gaps[:1]
    exact = None
    if weights is None and gaps.shape[1] > 1 and np.isin(gaps, (-1.0, 0.0, 1.0)).all():
        exact = sign_flip(gaps.sum(0))
        if len(gaps) == 1:
            return exact
    errors = [(spread.draws, len(gaps) - 1), (spread.items, spread.item_freedom)]
    random = _t_test(spread.value, errors)
    return random if exact is None or random is None else max(random, exact)


def _t_test(value: float, errors: list[tuple[float | None, float]]) -> float | None:
    """Return the p value of a mean with squared errors, each with its degrees of freedom."""
    seen = [(error, freedom) for error, freedom in errors if error]
    if not seen:
        return None

    def reach(tail: float) -> float:
        """Return by how much the squared half interval exceeds the squared mean."""
        total = math.fsum(stats.t.isf(tail, freedom) ** 2 * error for error, freedom in seen)
        return total / value**2 - 1

    smallest = 1e-16
    if not value or reach(smallest) <= 0:
        return 2 * smallest if value else 1.0
    return 2 * float(optimize.brentq(reach, smallest, 0.5, xtol=1e-17))
