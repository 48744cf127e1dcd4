"""Shares of variance and the spread of draws, against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lm_calib_plugin import comparison


def naive_shares(means, sds):
    found = comparison.variance_shares(means, sds)
    return np.array([found.source, found.method, found.interaction, found.draw])


def test_variance_shares_against_loops():
    rng = np.random.default_rng(5)
    means, sds = rng.normal(60, 2, (3, 5)), rng.uniform(0, 1, (3, 5))
    grand = sum(means[i, j] for i in range(3) for j in range(5)) / 15
    source = sum((sum(means[i]) / 5 - grand) ** 2 for i in range(3)) / 3
    method = sum((sum(means[:, j]) / 3 - grand) ** 2 for j in range(5)) / 5
    between = sum((means[i, j] - grand) ** 2 for i in range(3) for j in range(5)) / 15
    draw = sum(sds[i, j] ** 2 for i in range(3) for j in range(5)) / 15
    found = comparison.variance_shares(means, sds)
    assert found.total == pytest.approx(between + draw)
    assert naive_shares(means, sds) * found.total == pytest.approx(
        [source, method, between - source - method, draw]
    )
    assert naive_shares(means, sds).sum() == pytest.approx(1)


def test_variance_shares_of_draws_equal_those_of_their_summaries():
    rng = np.random.default_rng(6)
    draws = [[rng.normal(i, 1 + j, 5 + i + j) for j in range(2)] for i in range(3)]
    means = np.array([[d.mean() for d in row] for row in draws])
    sds = np.array([[math.sqrt(d.var(ddof=1)) for d in row] for row in draws])
    found = comparison.variance_shares_of_draws(draws)
    assert found.draw == pytest.approx(comparison.variance_shares(means, sds).draw)
    assert found.total == pytest.approx(comparison.variance_shares(means, sds).total)


def test_draw_spread():
    scores = np.random.default_rng(11).normal(50, 0.3, 20)
    found = comparison.draw_spread(scores)
    mean = sum(scores) / 20
    assert found.sd == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / 19))
    assert (found.lowest, found.highest, found.draws) == (min(scores), max(scores), 20)
    assert found.range == max(scores) - min(scores)
    assert found.sd_interval.low < found.sd < found.sd_interval.high
    assert 0.15 < found.sd_interval.low < found.sd_interval.high < 0.45


def test_a_method_without_data_has_no_spread_at_all():
    scores = [0.1, 0.1, 0.1]
    assert np.std(scores) > 0  # rounding of the mean
    assert comparison.draw_spread(scores).sd == 0.0
