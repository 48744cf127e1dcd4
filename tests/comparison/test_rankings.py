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
