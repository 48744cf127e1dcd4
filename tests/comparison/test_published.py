"""Statistics of comparisons: against published summaries, and against plain loops.

The published numbers (arXiv 2410.17711 and the per-seed values of its repository) reach us as
means and standard deviations of two decimals. Every tolerance below is derived: from that rounding
(each input may be off by 0.005, all at their worst at once), the rounding of the published result
and, where the result was counted over 20 actual draws and we have only their normal summary, the
scatter between the two (three standard deviations, simulated).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lm_calib_plugin import comparison

SOURCES = ("c4", "wikipedia", "slimpajama", "dclm")
# means [source, method], sds, draws of each cell; methods: Wanda, DSnoT; "probably" 60 % removed
DCLM = (
    np.array([[62.53, 61.72], [61.02, 60.48], [62.30, 61.20], [62.88, 62.24]]),
    np.array([[0.22, 0.22], [0.22, 0.24], [0.23, 0.21], [0.20, 0.23]]),
    np.array([[20, 20], [20, 20], [20, 20], [20, 20]]),
)
LLAMA = (
    np.array([[56.98, 56.94], [56.70, 57.07], [56.90, 56.91], [57.23, 57.45]]),
    np.array([[0.20, 0.26], [0.22, 0.27], [0.19, 0.24], [0.20, 0.20]]),
    np.array([[20, 20], [18, 20], [20, 20], [12, 20]]),
)
MODELS = {"dclm": DCLM, "llama": LLAMA}
# Wanda, DCLM-7B; rows: 64, 128, 256, 512, 1024, 2048 sequences
AMOUNTS = np.array(
    [
        [62.47, 60.97, 62.25, 62.92],
        [62.53, 61.03, 62.31, 62.88],
        [62.55, 61.05, 62.36, 62.87],
        [62.48, 61.05, 62.44, 62.95],
        [62.48, 61.07, 62.47, 62.94],
        [62.47, 61.06, 62.47, 62.95],
    ]
)


def shares(means, sds):
    found = comparison.variance_shares(means, sds)
    return np.array([found.source, found.method, found.interaction, found.draw])


def rounding(function, *inputs, step=0.005):
    """Return how far rounded inputs can move each result: the sum of all first-order moves."""
    total = 0.0
    for number, array in enumerate(inputs):
        for place in np.ndindex(array.shape):
            moved = []
            for sign in (1, -1):
                changed = [a.astype(float).copy() for a in inputs]
                changed[number][place] += sign * step
                moved.append(np.asarray(function(*changed)))
            total = total + np.abs(moved[0] - moved[1]) / 2
    return np.asarray(total)


def normal_wins(means, sds):
    """P(first column > second), row by row."""
    return np.array(
        [
            comparison.probability_better_normal(m[0], s[0], m[1], s[1])
            for m, s in zip(means, sds, strict=True)
        ]
    )


def counting_scatter(mean_a, sd_a, n_a, mean_b, sd_b, n_b, trials=300):
    """Return the sd of P(A > B) counted over all draw pairs minus P from their own summaries."""
    rng = np.random.default_rng(1)
    off = []
    for _ in range(trials):
        a, b = rng.normal(mean_a, sd_a, n_a), rng.normal(mean_b, sd_b, n_b)
        normal = comparison.probability_better_normal(
            a.mean(), a.std(ddof=1), b.mean(), b.std(ddof=1)
        )
        off.append(comparison.probability_better(a, b) - normal)
    return np.std(off)


@pytest.mark.parametrize(
    ("model", "published"),
    [("dclm", (0.680, 0.228, 0.017, 0.074)), ("llama", (0.360, 0.050, 0.068, 0.522))],
)
def test_published_variance_shares(model, published):
    means, sds, _ = MODELS[model]
    allowed = rounding(shares, means, sds) + 0.0005
    # The tolerance tells these shares apart: at most 0.8 points (DCLM) and 2.3 points (LLaMA).
    assert allowed.max() < {"dclm": 0.008, "llama": 0.023}[model]
    np.testing.assert_array_less(np.abs(shares(means, sds) - published), allowed)


@pytest.mark.parametrize(
    ("model", "published"),
    [("dclm", (1.00, 0.96, 1.00, 0.98)), ("llama", (0.56, 0.15, 0.45, 0.25))],
)
def test_published_probability_that_wanda_beats_dsnot(model, published):
    means, sds, counts = MODELS[model]
    scatter = [
        counting_scatter(m[0], s[0], n[0], m[1], s[1], n[1])
        for m, s, n in zip(means, sds, counts, strict=True)
    ]
    allowed = rounding(normal_wins, means, sds) + 0.005 + 3 * np.array(scatter)
    assert allowed.max() < 0.12
    np.testing.assert_array_less(np.abs(normal_wins(means, sds) - published), allowed)


@pytest.mark.parametrize(("model", "published"), [("dclm", 0.76), ("llama", 0.63)])
def test_published_probability_that_c4_beats_slimpajama(model, published):
    means, sds, counts = (table[[0, 2], 0][None] for table in MODELS[model])
    (m, s, n) = means[0], sds[0], counts[0]
    scatter = counting_scatter(m[0], s[0], n[0], m[1], s[1], n[1])
    allowed = rounding(normal_wins, means, sds)[0] + 0.005 + 3 * scatter
    assert allowed < 0.12
    assert abs(normal_wins(means, sds)[0] - published) < allowed


@pytest.mark.parametrize(("model", "published"), [("dclm", (0.87, 0.97)), ("llama", (0.63, 0.53))])
def test_published_expected_tau(model, published):
    means, sds, counts = MODELS[model]
    rng = np.random.default_rng(2)
    for method in (0, 1):
        m, s, n = means[:, method], sds[:, method], counts[:, method]
        off = []
        for _ in range(60):
            draws = [rng.normal(a, b, k) for a, b, k in zip(m, s, n, strict=True)]
            summary = [d.mean() for d in draws], [d.std(ddof=1) for d in draws]
            off.append(
                comparison.expected_tau(draws, 500) - comparison.expected_tau_normal(*summary)
            )
        allowed = rounding(comparison.expected_tau_normal, m, s) + 0.005 + 3 * np.std(off)
        assert allowed < 0.14
        assert abs(comparison.expected_tau_normal(m, s) - published[method]) < allowed


def test_published_within_cell_range_fits_the_published_sd():
    # 0.67 to 1.03 points over the cells: the range of n normal draws is d(n) times the sd.
    rng = np.random.default_rng(3)
    for _, sds, counts in MODELS.values():
        for sd, n in zip(sds.ravel(), counts.ravel(), strict=True):
            ranges = [comparison.draw_spread(rng.normal(0, sd, n), 1).range for _ in range(200)]
            low, high = np.quantile(ranges, [0.005, 0.995])
            assert low < 1.03
            assert high > 0.67


def test_published_amounts_shrink_the_draws_and_leave_the_mean():
    # sd 0.25 -> 0.11 (text) and 0.24 -> 0.13 (target): both at most 0.65 of what it was.
    assert 0.11 / 0.25 <= 0.65
    assert 0.13 / 0.24 <= 0.65
    # As a table [source, amount]: sources differ by more than a hundred times the amounts.
    found = comparison.variance_shares(AMOUNTS.T, np.full((4, 6), 0.18))
    assert found.method < 0.01 * found.source
    assert found.source > 0.85
    # No amount ranks the sources otherwise; at 2,048 C4 and SlimPajama tie at two decimals.
    for row in AMOUNTS:
        tied = row[0] == row[2]
        expected = 5 / math.sqrt(5 * 6) if tied else 1.0
        assert comparison.kendall_tau_b(row, AMOUNTS[1], 10).value == pytest.approx(expected)


def test_published_winner_flips_are_not_computable_but_constrained():
    # 2608.15046 prints sd, item error and flags, not the five scores, so its flips cannot be
    # recomputed. One of its rows has no flip and yet a rank-flip rate of 0.003 for the mean of
    # five draws; resampling the draws alone cannot flip then, so that rate has item noise in it.
    rng = np.random.default_rng(4)
    a = rng.normal(0, 1, 5)
    b = a - rng.uniform(0.1, 3, 5)
    assert not comparison.winner_flips(a, b)
    assert comparison.two_level_bootstrap(a, b).low > 0
    b[2] = a[2] + 0.01
    assert comparison.winner_flips(a, b)
    assert not comparison.winner_flips(a, a)


@pytest.mark.parametrize(
    ("items", "discordance"),
    [
        (1855, 0.12),  # pooled
        (2164, 0.14),  # MMLU
        (1184, 101 / 1319),  # GSM8K and the next: a whole number of the task's items
        (1416, 116 / 1267),  # WinoGrande
        (695, 451 / 10042),  # HellaSwag
        (1218, 0.0788),  # ARC-C
    ],
)
def test_published_items_needed_for_two_points(items, discordance):
    # 2608.15046 prints no formula and no discordance. Only with z(0.95) + z(0.80) do its numbers
    # come out of discordances as round as these.
    assert comparison.items_needed(discordance, both_sides=False) == items
    assert comparison.items_needed(discordance) > items


def test_published_tables_with_the_noise_of_the_draws_taken_out():
    for means, sds, counts in MODELS.values():
        draws = []
        for row in range(4):
            draws.append([])
            for column in range(2):
                scores = stats.norm.ppf(
                    (np.arange(counts[row, column]) + 0.5) / counts[row, column]
                )
                scores = (scores - scores.mean()) / scores.std(ddof=1)
                draws[row].append(means[row, column] + sds[row, column] * scores)
        naive = comparison.variance_shares_of_draws(draws)
        np.testing.assert_allclose(shares(means, sds), [*vars(naive).values()][:4])
        found = comparison.variance_components(draws, resamples=100)
        assert found.estimator == ("reml" if (counts != 20).any() else "anova")
        # A random effect of two or four levels is larger than their population variance.
        assert found.variances["source"] > naive.source * naive.total
        assert found.variances["draw"] == pytest.approx(naive.draw * naive.total, rel=0.05)
        assert sum(share.value for share in found.shares.values()) == pytest.approx(1)
