"""How often intervals hold the truth, by simulation: the plain one does not for few draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lm_calib_plugin import comparison
from lm_calib_plugin.comparison.resampling import expansion
from tests.comparison.simulated import arms, expected_score

TRIALS = 200


def coverage(draws, draw_sd, item_sd, answers, paired=True, seed=1):
    """Return the shares of plain and of expanded intervals that hold the truth."""
    rng = np.random.default_rng(seed)
    truth = 0.0 if paired else expected_score(draw_sd, item_sd)
    held = np.zeros(2)
    for trial in range(TRIALS):
        a, b = arms(rng, draws, 200, draw_sd, item_sd, answers=answers)
        for place, expanded in enumerate((False, True)):
            found = comparison.two_level_bootstrap(
                a, b if paired else None, 300, trial, expanded=expanded
            )
            held[place] += found.low <= truth <= found.high
    return held / TRIALS


# Bands: what 1,000 trials gave, and three standard errors of 200 trials around (0.05 at 95 %).
@pytest.mark.parametrize(
    ("draws", "low", "high"), [(2, 0.41, 0.62), (5, 0.74, 0.90), (10, 0.83, 0.96), (20, 0.86, 0.98)]
)
def test_the_plain_interval_is_too_short_where_draws_are_what_varies(draws, low, high):
    plain, expanded = coverage(draws, 0.6, 0.0, answers=False)
    assert low <= plain <= high
    assert expanded >= 0.89
    assert plain <= expanded


@pytest.mark.parametrize("draws", [5, 10, 20])
def test_both_intervals_hold_where_items_are_what_varies(draws):
    assert coverage(draws, 0.02, 0.8, answers=False).min() >= 0.89
    # A score by itself: its items differ a lot more than its draws.
    assert coverage(draws, 0.1, 0.3, answers=True, paired=False).min() >= 0.89


def test_both_intervals_are_too_long_where_only_single_answers_vary():
    plain, expanded = coverage(5, 0.1, 0.3, answers=True)
    assert min(plain, expanded) >= 0.95


def test_expansion_is_that_of_a_t_interval():
    # With items that do not vary, and normal percentiles in place of resampled ones, the interval
    # is the t interval of the draws.
    scores = np.random.default_rng(2).normal(0, 1, 6)
    sd = scores.std(ddof=0) / np.sqrt(6)  # of resampled means
    low, high = stats.t.interval(0.95, 5, scores.mean(), stats.sem(scores))
    half = stats.norm.ppf(0.975) * sd * expansion(6)
    assert (scores.mean() - half, scores.mean() + half) == pytest.approx((low, high))
    assert expansion(1) == 1
    wide = comparison.two_level_bootstrap(scores, resamples=20_000, expanded=True)
    assert (wide.high - wide.low) == pytest.approx(high - low, rel=0.05)


def test_paired_draws_and_items_make_the_interval_shorter():
    rng = np.random.default_rng(3)
    a = arms(rng, 8, 200, 0.3, 0.0, answers=False)[0]
    b = np.clip(a - 0.02 + rng.normal(0, 0.01, a.shape), 0, 1)
    paired = comparison.two_level_bootstrap(a, b)
    shuffled = comparison.two_level_bootstrap(a, b[rng.permutation(8)][:, rng.permutation(200)])
    assert paired.excludes_zero
    assert (shuffled.high - shuffled.low) > 5 * (paired.high - paired.low)


def test_unweighted_intervals_are_what_they_were():
    scores = np.random.default_rng(4).normal(0, 1, (3, 20))
    rng = np.random.default_rng(5)
    rows = rng.multinomial(3, np.full(3, 1 / 3), 100) / 3
    columns = rng.multinomial(20, np.full(20, 1 / 20), 100) / 20
    low, high = np.quantile(
        ((rows @ scores) * columns).sum(1), [(1 - 0.95) / 2, 1 - (1 - 0.95) / 2]
    )
    found = comparison.two_level_bootstrap(scores, resamples=100, seed=5)
    assert (found.value, found.low, found.high) == (scores.mean(), low, high)
