"""Two arms against each other, against loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lm_calib_plugin import comparison


def test_probability_better_counts_pairs():
    rng = np.random.default_rng(7)
    a, b = rng.integers(0, 5, 7), rng.integers(0, 5, 4)
    points = [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in itertools.product(a, b)]
    assert comparison.probability_better(a, b) == pytest.approx(sum(points) / 28)
    assert comparison.probability_better(a, b) + comparison.probability_better(b, a) == 1
    # The same number by the rank-sum statistic.
    assert comparison.probability_better(a, b) == pytest.approx(
        stats.mannwhitneyu(a, b).statistic / 28
    )


def test_probability_better_normal_is_the_limit_of_many_draws():
    rng = np.random.default_rng(8)
    a, b = rng.normal(1.0, 0.5, 3000), rng.normal(0.7, 0.8, 3000)
    normal = comparison.probability_better_normal(1.0, 0.5, 0.7, 0.8)
    assert comparison.probability_better(a, b) == pytest.approx(normal, abs=0.025)
    assert comparison.probability_better_normal(1, 0, 1, 0) == 0.5
    assert comparison.probability_better_normal(2, 0, 1, 0) == 1.0


@pytest.mark.parametrize(
    ("probability", "low", "high", "expected"),
    [
        (0.75, 0.1, 2.0, True),
        (0.25, -2.0, -0.1, True),
        (0.74, 0.1, 2.0, False),
        (0.26, -2.0, -0.1, False),
        (1.0, -0.1, 2.0, False),
        (1.0, 0.0, 2.0, False),
    ],
)
def test_resolved_needs_both(probability, low, high, expected):
    delta = comparison.Interval((low + high) / 2, low, high)
    assert comparison.resolved(probability, delta) is expected


def test_two_level_bootstrap_against_a_loop():
    rng = np.random.default_rng(12)
    scores = rng.normal(0, 1, (4, 30)) + rng.normal(0, 1, 30) + rng.normal(0, 1, (4, 1))
    other = np.random.default_rng(13)
    means = []
    for _ in range(4000):
        draws = other.integers(0, 4, 4)
        items = other.integers(0, 30, 30)
        means.append(np.mean([[scores[d, i] for i in items] for d in draws]))
    found = comparison.two_level_bootstrap(scores, resamples=4000)
    assert found.value == pytest.approx(scores.mean())
    # Quantile error of 4,000 resamples: sqrt(0.025 * 0.975 / 4000) / density(0.06 / sd) = 0.04 sd.
    allowed = 4 * math.sqrt(2) * 0.042 * np.std(means)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=allowed)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=allowed)


def test_both_arms_get_the_same_draws_and_items():
    scores = np.random.default_rng(14).normal(0, 5, (3, 50))
    found = comparison.two_level_bootstrap(scores, scores - 0.5)
    assert (found.low, found.value, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.excludes_zero
    one_level = comparison.two_level_bootstrap(scores.mean(1))
    # Items of their own add to the interval of the draws.
    both = comparison.two_level_bootstrap(scores)
    assert one_level.value == pytest.approx(both.value)


def test_item_noise_does_not_average_out_over_draws():
    items = np.random.default_rng(15).normal(0, 1, 400)
    found = comparison.two_level_bootstrap(np.tile(items, (10, 1)))
    error = items.std() / 20
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.12)


def test_memory_of_the_bootstrap_is_bounded_and_chunks_do_not_matter_much(monkeypatch):
    scores = np.random.default_rng(16).normal(0, 1, (3, 40))
    whole = comparison.two_level_bootstrap(scores)
    monkeypatch.setattr("lm_calib_plugin.comparison.resampling._CHUNK", 4000)
    parts = comparison.two_level_bootstrap(scores)
    assert parts.low == pytest.approx(whole.low, abs=0.1)
    assert parts.value == whole.value


def test_paired_delta_counts_flips():
    rng = np.random.default_rng(17)
    a, b = rng.integers(0, 2, (3, 25)), rng.integers(0, 2, (3, 25))
    found = comparison.paired_delta(a, b, 200)
    cells = list(itertools.product(range(3), range(25)))
    assert found.better == pytest.approx(sum(a[c] > b[c] for c in cells) / 75)
    assert found.worse == pytest.approx(sum(a[c] < b[c] for c in cells) / 75)
    assert found.ties == pytest.approx(sum(a[c] == b[c] for c in cells) / 75)
    assert found.churn + found.ties == pytest.approx(1)
    assert found.delta.value == pytest.approx(found.better - found.worse)
    assert comparison.paired_delta(a[:, 0], b[:, 0], 50).ties * 3 == sum(a[:, 0] == b[:, 0])
