"""Two arms against each other: one draw each, or pair by pair."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lm_calib_plugin.comparison.items import item_scores
from lm_calib_plugin.comparison.numbers import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    differences,
    draws_by_items,
    finite,
    paired_table,
    percentile_interval,
)
from lm_calib_plugin.comparison.resampling import Resampling, expand

RESOLVED = 0.75


@dataclass(frozen=True)
class PairedDelta:
    """Mean of ``a - b`` over pairs of equal draw and item.

    ``better``, ``worse`` and ``ties`` are shares of all pairs: those where a is above, below and
    equal to b. With scores of 0 and 1 and b the dense model, ``worse`` are harmful flips.
    """

    delta: Interval
    better: float
    worse: float
    ties: float

    @property
    def churn(self) -> float:
        """Share of the pairs that differ."""
        return self.better + self.worse


def probability_better(a: ArrayLike, b: ArrayLike) -> float:
    """Return P(A > B) with one draw each: the share of all draw pairs, ties counted as 0.5.

    Parameters
    ----------
    a, b
        ``[draws]``, scores where more is better; lengths may differ.
    """
    first, second = finite("a", a, 1), finite("b", b, 1)
    signs = np.sign(first[:, None] - second)
    return float((signs.mean() + 1) / 2)


def probability_better_normal(mean_a: float, sd_a: float, mean_b: float, sd_b: float) -> float:
    """Return P(A > B) with one draw each, from summaries of normal draws."""
    gap, sd = finite("mean", [mean_a - mean_b], 1)[0], math.hypot(sd_a, sd_b)
    if sd == 0:
        return float((np.sign(gap) + 1) / 2)
    return float(stats.norm.cdf(gap / sd))


def resolved(probability: float, delta: Interval) -> bool:
    """Tell whether a difference may be called one.

    One draw must tell the two apart (P(A > B) at least 0.75, or at most 0.25) and the interval of
    the paired delta must exclude 0.
    """
    return (probability >= RESOLVED or probability <= 1 - RESOLVED) and delta.excludes_zero


def winner_flips(a: ArrayLike, b: ArrayLike) -> bool:
    """Tell whether paired draws disagree on the winner: A above B in one, below in another."""
    gaps = differences("a", a, b, 1)
    return bool((gaps > 0).any() and (gaps < 0).any())


def two_level_bootstrap(
    a: ArrayLike,
    b: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    confidence: float = CONFIDENCE,
    expanded: bool = False,
) -> Interval:
    """Return the mean of a, or of ``a - b``, with the interval over draws and items.

    Each resample draws draws with replacement, then items. Every draw is judged on the same items,
    so one set of items serves all draws of a resample; draws and items are the same for both arms.

    The plain interval is too short for few draws: their spread is taken for that of their
    resamples, smaller by ``sqrt((K - 1) / K)``, and the percentiles are normal ones where a t
    distribution is due. Where draws are nearly all that varies, 95 % are really 51 % at 2 draws,
    72 % at 3, 82 % at 5, 90 % at 10 and 92 % at 20 (1,000 simulations of 200 items, normal draw
    effects on the logits of the items). ``expanded`` scales the deviations of the draws, not of
    the items, by ``sqrt(K / (K - 1)) * t / z`` (the expanded percentile interval of Hesterberg,
    2015); it then covers 93 %, 94 %, 95 %, 94 % and 95 %. Where the noise of a draw on single items
    is nearly all that varies, both are too long (98 % and more), as it is resampled with the draws
    and with the items (Owen, 2007).

    Parameters
    ----------
    a, b
        ``[draws, items]``; or ``[draws]``, where only draws are resampled.
    weights
        ``[items]``, above 0, the same for all draws: a score is ``sum(w x) / sum(w)``, and a
        resample takes that ratio anew.
    strata
        ``[items]``, whole numbers: the fixed block (task) of each item. Items are taken again
        within their block, and what a block weighs in sum stays, so that differences between
        blocks are no noise.
    confidence
        Of the interval, 0.95 by default.
    expanded
        Whether to make up for few draws; one draw alone has no deviations to scale.
    """
    scores = draws_by_items("a", a) if b is None else paired_table(a, b)
    draws, items = scores.shape
    taken = Resampling(draws, items, resamples, seed, weights=weights, strata=strata)
    ordered = taken.ordered(scores)
    found = []
    for shares, columns in taken.parts():
        rows = expand(shares, draws, confidence if expanded else None)
        found.append(((rows @ ordered) * columns).sum(1))
    value = scores.mean() if weights is None else item_scores(scores, weights).mean()
    return percentile_interval(float(value), np.concatenate(found), confidence)


def paired_delta(
    a: ArrayLike,
    b: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    expanded: bool = False,
) -> PairedDelta:
    """Compare two arms pair by pair; see :func:`two_level_bootstrap` for the interval.

    Parameters
    ----------
    a, b
        ``[draws, items]`` or ``[draws]``, of one shape; equal places are one pair.
    weights
        ``[items]``; they weigh the difference, not the shares of pairs.
    strata
        ``[items]``, the fixed block of each.
    """
    gaps = paired_table(a, b)
    delta = two_level_bootstrap(
        a, b, resamples, seed, weights=weights, strata=strata, expanded=expanded
    )
    return PairedDelta(
        delta,
        better=float((gaps > 0).mean()),
        worse=float((gaps < 0).mean()),
        ties=float((gaps == 0).mean()),
    )
