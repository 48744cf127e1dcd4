"""Rank correlations, against loops, every combination and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lm_calib_plugin import comparison


def naive_tau_b(a, b):
    agree = ties_a = ties_b = 0
    pairs = list(itertools.combinations(range(len(a)), 2))
    for i, j in pairs:
        agree += np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
        ties_a += a[i] == a[j]
        ties_b += b[i] == b[j]
    return agree / math.sqrt((len(pairs) - ties_a) * (len(pairs) - ties_b))


def test_correlations_against_loops():
    rng = np.random.default_rng(9)
    a, b = rng.integers(0, 6, 12), rng.integers(0, 6, 12)
    tau = comparison.kendall_tau_b(a, b, 300)
    assert tau.value == pytest.approx(naive_tau_b(a, b))
    ranks = [[sum(y < x for y in s) + sum(y == x for y in s) / 2 for x in s] for s in (a, b)]
    rho = comparison.spearman(a, b, 300)
    assert rho.value == pytest.approx(np.corrcoef(*ranks)[0, 1])
    for found in (tau, rho):
        assert -1 <= found.low < found.value < found.high <= 1
    assert tau == comparison.kendall_tau_b(a, b, 300)
    assert tau != comparison.kendall_tau_b(a, b, 300, seed=1)
    same = comparison.spearman(np.arange(20), np.arange(20), 50)
    assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))


def test_expected_tau_against_every_combination_of_draws():
    draws = [[1.0, 2.0, 2.0], [2.0, 3.0], [0.0, 4.0, 2.5]]
    means = [np.mean(d) for d in draws]
    found = []
    for taken in itertools.product(*draws):
        found.append(0.0 if len(set(taken)) == 1 else naive_tau_b(taken, means))
    sampled = comparison.expected_tau(draws, 20_000)
    error = np.std(found) / math.sqrt(20_000)
    assert sampled == pytest.approx(np.mean(found), abs=4 * error)


@pytest.mark.parametrize("means", [[1.0, 1.3, 0.2, 2.0], [1.0, 1.0, 0.2, 2.0]])
def test_expected_tau_of_summaries_against_simulation(means):
    sds = np.array([0.5, 0.2, 0.9, 0.4])
    rng = np.random.default_rng(10)
    simulated = [naive_tau_b(rng.normal(means, sds), means) for _ in range(3000)]
    error = np.std(simulated) / math.sqrt(len(simulated))
    exact = comparison.expected_tau_normal(means, sds)
    assert exact == pytest.approx(np.mean(simulated), abs=4 * error)
    assert comparison.expected_tau_normal(means, np.zeros(4)) == pytest.approx(1)


def test_one_draw_tau_says_what_one_draw_may_see():
    draws = [[1.0, 2.0, 2.0], [2.0, 3.0], [0.0, 4.0, 2.5]]
    found = comparison.one_draw_tau(draws, 20_000)
    assert found.value == comparison.expected_tau(draws, 20_000)
    means = [np.mean(d) for d in draws]
    taus = [naive_tau_b(t, means) for t in itertools.product(*draws) if len(set(t)) > 1]
    # Few values are possible; each bound is one of them or between two.
    assert found.low == pytest.approx(min(taus))
    assert found.high == pytest.approx(max(taus))
    steady = comparison.one_draw_tau([[1.0], [2.0], [3.0]], 10)
    assert (steady.low, steady.value, steady.high) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("higher", [True, False])
def test_rank_stability_against_every_combination(higher):
    draws = [[1.0, 2.0, 2.0], [2.0, 3.0], [0.0, 4.0, 2.5], [2.0]]
    expected, combinations = np.zeros((4, 4)), list(itertools.product(*draws))
    for taken in combinations:
        for entry, score in enumerate(taken):
            ahead = sum((s > score) if higher else (s < score) for s in taken)
            tied = sum(s == score for s in taken)
            expected[entry, ahead : ahead + tied] += 1 / tied / len(combinations)
    found = comparison.rank_stability(draws, higher, 20_000)
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / math.sqrt(20_000))
    np.testing.assert_allclose(found.sum(0), 1)
    np.testing.assert_allclose(found.sum(1), 1)
    steady = comparison.rank_stability([[1.0], [3.0], [2.0]], higher, 10)
    assert steady.argmax(1).tolist() == ([2, 0, 1] if higher else [0, 2, 1])


def test_tau_between_columns():
    scores = np.random.default_rng(11).integers(0, 4, (7, 3)).astype(float)
    found = comparison.tau_between(np.c_[scores, np.ones(7)])
    for i, j in itertools.product(range(3), repeat=2):
        assert found[i, j] == pytest.approx(naive_tau_b(scores[:, i], scores[:, j]))
    assert np.isnan(found[3]).all()
    assert np.isnan(found[:, 3]).all()
    np.testing.assert_array_equal(np.diag(found)[:3], 1)
