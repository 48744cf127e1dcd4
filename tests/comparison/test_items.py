"""Items: their error, weights, and the split of an error into draws and items."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lm_calib_plugin import comparison
from lm_calib_plugin.comparison.items import crossed


def test_item_error_is_the_standard_error_of_each_draw_averaged():
    scores = np.random.default_rng(1).integers(0, 2, (4, 60)).astype(float)
    expected = np.mean([stats.sem(draw) for draw in scores])
    assert comparison.item_error(scores) == pytest.approx(expected)
    other = np.random.default_rng(2).integers(0, 2, (4, 60))
    expected = np.mean([stats.sem(x - y) for x, y in zip(scores, other, strict=True)])
    assert comparison.item_error(scores, other) == pytest.approx(expected)
    assert comparison.item_error(scores[:, :1]) is None
    assert comparison.item_error([0.3, 0.4]) is None


def test_weights_make_a_score_a_ratio():
    rng = np.random.default_rng(3)
    nats, words = rng.normal(3, 1, (2, 40)), rng.integers(5, 500, 40)
    expected = [sum(n * w for n, w in zip(draw, words, strict=True)) / sum(words) for draw in nats]
    np.testing.assert_allclose(comparison.item_scores(nats, words), expected)
    errors = []
    for draw, score in zip(nats, expected, strict=True):
        squares = sum((w * (n - score)) ** 2 for n, w in zip(draw, words, strict=True))
        errors.append(math.sqrt(squares * 40 / 39) / sum(words))
    assert comparison.item_error(nats, weights=words) == pytest.approx(np.mean(errors))
    even = np.full(40, 7.0)
    assert comparison.item_error(nats, weights=even) == pytest.approx(comparison.item_error(nats))
    np.testing.assert_allclose(comparison.item_scores(nats, even), nats.mean(1))
    np.testing.assert_array_equal(comparison.item_scores([0.1, 0.2]), [0.1, 0.2])


def test_the_ratio_error_is_the_spread_of_scores_over_other_documents():
    rng = np.random.default_rng(4)
    words = rng.lognormal(4, 1, (3000, 100))
    nats = 3 + 0.2 * np.log(words) + rng.normal(0, 1, words.shape)  # longer ones are harder
    scores = (nats * words).sum(1) / words.sum(1)
    errors = [
        comparison.item_error(n[None], weights=w) for n, w in zip(nats[:300], words, strict=False)
    ]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(scores.std(), rel=0.1)


def test_weighted_bootstrap_against_a_loop():
    rng = np.random.default_rng(5)
    scores, words = rng.normal(3, 1, (4, 30)) + rng.normal(0, 1, 30), rng.integers(1, 50, 30)
    other, means = np.random.default_rng(6), []
    for _ in range(4000):
        draws, items = other.integers(0, 4, 4), other.integers(0, 30, 30)
        means.append(
            np.mean([np.sum(scores[d, items] * words[items]) / words[items].sum() for d in draws])
        )
    found = comparison.two_level_bootstrap(scores, resamples=4000, weights=words)
    assert found.value == pytest.approx(np.mean(comparison.item_scores(scores, words)))
    allowed = 4 * math.sqrt(2) * 0.042 * np.std(means)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=allowed)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=allowed)
    plain = comparison.two_level_bootstrap(scores)
    even = comparison.two_level_bootstrap(scores, weights=np.full(30, 3))
    assert (even.low, even.value, even.high) == pytest.approx((plain.low, plain.value, plain.high))
    zero = np.zeros_like(scores)
    paired = comparison.paired_delta(scores, zero, weights=words).delta
    assert paired == comparison.two_level_bootstrap(scores, zero, weights=words)


def test_an_error_is_split_into_draws_and_items():
    rng = np.random.default_rng(7)
    table = rng.normal(0, 1, (4, 25)) + rng.normal(0, 2, (4, 1)) + rng.normal(0, 3, 25)
    found = crossed(table)
    assert found.value == pytest.approx(table.mean())
    assert found.draws == pytest.approx(stats.sem(table.mean(1)) ** 2)
    assert found.items == pytest.approx(stats.sem(table.mean(0)) ** 2)
    rest = sum(
        (table[d, i] - table[d].mean() - table[:, i].mean() + table.mean()) ** 2
        for d in range(4)
        for i in range(25)
    )
    assert found.both == pytest.approx(rest / (3 * 24) / (4 * 25))
    assert found.items_alone == pytest.approx(found.items - found.both)
    alone = crossed(table[:1])
    assert (alone.draws, alone.both) == (None, 0.0)
    same = crossed(np.repeat(table[:1] / 3, 3, 0))
    assert (same.draws, same.both) == (0.0, 0.0)
    assert crossed(table[:, :1]).items is None
    # Sampled many times, the three parts are the truth: 4 / 4 + 1 / 100, 9 / 25 + 1 / 100, 1 / 100.
    parts = [
        crossed(rng.normal(0, 1, (4, 25)) + rng.normal(0, 2, (4, 1)) + rng.normal(0, 3, 25))
        for _ in range(3000)
    ]
    means = [np.mean([getattr(p, name) for p in parts]) for name in ("draws", "items", "both")]
    assert means == pytest.approx([1.01, 0.37, 0.01], rel=0.06)
