"""p values: exact ones by enumeration, the others by their level under the null."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lm_calib_plugin import comparison
from lm_calib_plugin.errors import UserError
from tests.comparison.simulated import arms


@pytest.mark.parametrize(("beneficial", "harmful"), [(0, 0), (1, 0), (3, 9), (10, 10), (40, 12)])
def test_mcnemar_is_the_binomial_test(beneficial, harmful):
    total = beneficial + harmful
    expected = 1.0 if not total else stats.binomtest(beneficial, total).pvalue
    assert comparison.mcnemar(beneficial, harmful) == pytest.approx(expected)
    assert comparison.mcnemar(harmful, beneficial) == comparison.mcnemar(beneficial, harmful)


@pytest.mark.parametrize("sums", [[3, 1, -2, 0, 1, 1, 2], [1, 1, 1, -1, 0], [5], [2, -2, 2, 2]])
def test_sign_flip_against_every_sign(sums):
    totals = [
        abs(sum(s * x for s, x in zip(signs, sums, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(sums))
    ]
    expected = np.mean(np.array(totals) >= abs(sum(sums)))
    assert comparison.sign_flip(sums) == pytest.approx(expected)


def test_one_draw_is_exactly_mcnemar():
    a, b = arms(np.random.default_rng(1), 1, 150, 0.0, 0.4, shift=0.3)
    expected = comparison.mcnemar(int((a > b).sum()), int((a < b).sum()))
    assert comparison.p_value(a, b) == expected
    assert comparison.flips(a, b).p_value == expected
    # Draws that all agree are one draw: ten copies are no evidence.
    assert comparison.p_value(np.repeat(a, 10, 0), np.repeat(b, 10, 0)) == expected


def test_other_tests_are_the_usual_ones_where_there_is_one():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.4, 1, (1, 30)), rng.normal(0, 1, (1, 30))
    assert comparison.p_value(a, b) == pytest.approx(stats.ttest_rel(a[0], b[0]).pvalue)
    assert comparison.p_value(a[0], b[0]) == pytest.approx(stats.ttest_rel(a[0], b[0]).pvalue)
    even = comparison.p_value(a, b, np.full(30, 4.0))
    assert even == pytest.approx(stats.ttest_rel(a[0], b[0]).pvalue)
    assert comparison.p_value(a, a) == 1.0
    assert comparison.p_value([0.5], [0.4]) is None
    assert comparison.p_value([0.5, 0.5], [0.4, 0.4]) is None
    assert comparison.p_value([9.0, 9.1, 9.0] * 20, [0.0] * 60) == pytest.approx(0, abs=1e-15)


def test_the_level_of_several_draws_solves_its_equation():
    rng = np.random.default_rng(3)
    gaps = rng.normal(0.1, 1, (4, 50)) + rng.normal(0, 0.2, (4, 1))
    p = comparison.p_value(gaps, np.zeros_like(gaps))
    draws, items = stats.sem(gaps.mean(1)), stats.sem(gaps.mean(0))
    half = math.hypot(stats.t.isf(p / 2, 3) * draws, stats.t.isf(p / 2, 49) * items)
    assert half == pytest.approx(abs(gaps.mean()))
    assert p > stats.ttest_1samp(gaps.mean(1), 0).pvalue
    assert p > stats.ttest_1samp(gaps.mean(0), 0).pvalue


# sd of draws, sd of what an arm does to items, whether draws carry the noise of answers
NULLS = [
    (0.1, 0.3, True),
    (0.6, 0.0, False),
    (0.6, 0.3, True),
    (0.02, 0.8, False),
    (0.0, 0.05, True),
]


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("draws", [2, 5])
def test_p_values_are_at_most_nominal_when_draws_share_items(null, draws):
    rng, trials = np.random.default_rng(4), 250
    found = np.array(
        [
            comparison.p_value(*arms(rng, draws, 200, *null[:2], answers=null[2]))
            for _ in range(trials)
        ]
    )
    for level in (0.05, 0.2):
        allowed = level + 3 * math.sqrt(level * (1 - level) / trials)
        assert (found <= level).mean() <= allowed


def test_flips_pooled_over_draws_are_no_evidence():
    # What p_value must not do: with equal arms, pooled McNemar calls a difference far too often,
    # and so does a test of items only where draws differ.
    rng, pooled, items = np.random.default_rng(5), [], []
    for _ in range(200):
        a, b = arms(rng, 5, 200, 0.3, 0.8)
        pooled.append(comparison.mcnemar(int((a > b).sum()), int((a < b).sum())))
        items.append(comparison.sign_flip((a - b).sum(0)))
    assert np.mean(np.array(pooled) <= 0.05) > 0.2
    assert np.mean(np.array(items) <= 0.05) > 0.1


def test_a_difference_is_found():
    rng = np.random.default_rng(6)
    found = [comparison.p_value(*arms(rng, 5, 400, 0.1, 0.3, shift=0.6)) for _ in range(50)]
    assert np.mean(np.array(found) <= 0.05) > 0.8


def test_flips_are_counted():
    a = np.array([[1, 1, 0, 0], [1, 0, 0, 1]])
    b = np.array([[1, 0, 1, 1], [1, 0, 0, 0]])
    found = comparison.flips(a, b)
    assert (found.draws, found.items) == (2, 4)
    assert (found.beneficial, found.harmful, found.ties) == (2 / 8, 2 / 8, 4 / 8)
    assert (found.net, found.churn) == (0.0, 0.5)
    assert found.net == a.mean() - b.mean()
    for bad in (a + 1, a * 0.5, a[0]):
        with pytest.raises(UserError, match="0 and 1"):
            comparison.flips(bad, bad)


def test_holm_against_its_definition():
    rng = np.random.default_rng(7)
    given = [*rng.uniform(0, 0.2, 6), None, 0.01, 0.01, 1.0]
    found = comparison.holm(given)
    assert found[6] is None
    tested = [p for p in given if p is not None]
    for alpha in (0.01, 0.04, 0.05, 0.1, 0.3, 0.7):
        # Step down: reject the smallest as long as it is at most alpha over the number left.
        rejected = set()
        left = sorted(tested)
        while left and left[0] <= alpha / len(left):
            rejected.add(left.pop(0))
        assert {p for p, q in zip(given, found, strict=True) if q is not None and q <= alpha} == (
            rejected
        )
    order = np.argsort(tested)
    adjusted = np.array([q for q in found if q is not None])[order]
    assert (np.diff(adjusted) >= 0).all()
    assert comparison.holm([]) == ()
    assert comparison.holm([None]) == (None,)
    with pytest.raises(UserError, match="1.5"):
        comparison.holm([1.5])
