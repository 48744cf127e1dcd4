"""Equivalence, what is needed to tell, and the sentence that sums it up."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy import stats

from lm_calib_plugin import comparison
from tests.comparison.simulated import arms


def test_items_needed_give_the_power_they_promise():
    # Discordance 0.12, equal accuracies: 80 % of tables of that size pass both one-sided tests.
    rng, trials = np.random.default_rng(1), 4000
    for both, quantile in ((True, 2), (False, 1)):
        count = comparison.items_needed(0.12, both_sides=both)
        flips = rng.multinomial(count, [0.06, 0.06, 0.88], trials)
        net = (flips[:, 0] - flips[:, 1]) / count
        error = np.sqrt(((flips[:, 0] + flips[:, 1]) / count - net**2) / count)
        passed = net > -0.02 + 1.6449 * error
        if quantile == 2:
            passed &= net < 0.02 - 1.6449 * error
        assert passed.mean() == pytest.approx(0.8, abs=4 * 0.4 / math.sqrt(trials))
    assert comparison.items_needed(0.0) == 1
    assert comparison.items_needed(0.24) == pytest.approx(2 * comparison.items_needed(0.12), abs=1)


def test_equivalence():
    rng = np.random.default_rng(2)
    a = rng.integers(0, 2, (1, 3000)).astype(float)
    b = np.where(rng.random((1, 3000)) < 0.02, 1 - a, a)
    found = comparison.equivalence(a, b)
    assert found.equivalent
    assert found.margin == 0.02
    wide = comparison.two_level_bootstrap(a, b)
    assert wide.low < found.interval.low < found.interval.high < wide.high
    assert not comparison.equivalence(a, b, 0.0001).equivalent
    assert not comparison.equivalence(a, b - 0.1).equivalent
    variance = (a - b).var(ddof=1)
    assert found.items_needed == comparison.items_needed(variance)
    # Draws that spread wider than the margin allows: no number of items certifies it.
    noisy = a + np.array([-0.1, 0.1, 0.0])[:, None]
    assert comparison.equivalence(noisy, np.repeat(b, 3, 0)).items_needed is None
    assert comparison.equivalence([0.5, 0.6], [0.5, 0.6]).items_needed is None


def test_draws_needed_against_a_search():
    for delta, sd, item in ((0.4, 1.0, 0.0), (0.4, 1.0, 0.1), (3.0, 1.0, 0.0), (0.1, 2.0, 0.04)):
        expected = next(
            count
            for count in range(2, 10_000)
            if (stats.t.ppf(0.975, count - 1) * sd) ** 2 / count + (1.959964 * item) ** 2 < delta**2
        )
        assert comparison.draws_needed(delta, sd, item) == expected
        assert comparison.draws_needed(-delta, sd, item) == expected
    assert comparison.draws_needed(0.0, 1.0) is None
    assert comparison.draws_needed(0.1, 1.0, 0.06) is None  # 1.96 * 0.06 > 0.1
    assert comparison.draws_needed(0.1, 0.0, 0.04) == 2


def test_as_many_draws_as_needed_are_enough():
    # The same mean and spread, with as many draws as were said to be needed: the interval excludes
    # 0. With a few less it does not.
    def scores(count):
        found = stats.norm.ppf((np.arange(count) + 0.5) / count)
        return 0.5 + (found - found.mean()) / found.std(ddof=1)

    total = comparison.needed(scores(4), np.zeros(4)).draws
    for count, excludes in ((total + 2, True), (total - 3, False)):
        found = comparison.two_level_bootstrap(scores(count), resamples=20_000, expanded=True)
        assert found.excludes_zero is excludes


def test_items_are_needed_where_draws_do_not_help():
    rng = np.random.default_rng(3)
    gaps = 0.01 + rng.normal(0, 1, 100) + rng.normal(0, 0.01, (5, 1))
    found = comparison.needed(gaps, np.zeros_like(gaps))
    assert found.draws is None
    error = stats.sem(gaps.mean(0))
    expected = 100 * (1.96 * error / gaps.mean()) ** 2
    assert found.items == pytest.approx(expected, rel=0.01)
    assert comparison.needed(gaps, gaps) == comparison.Needed(None, None)


def spread(mean, sd, draws=10, items=400, seed=0):
    """Return ``[draws, items]`` with this mean and sd over draws, and items of their own."""
    rng = np.random.default_rng(seed)
    moved = rng.normal(size=draws)
    moved = (moved - moved.mean()) / moved.std(ddof=1) if draws > 1 else np.zeros(1)
    return np.random.default_rng(99).normal(0.5, 0.3, items) + mean + sd * moved[:, None]


CASES = [
    # kind, a, b, arguments, what the words hold
    ("resolved_better", spread(0.05, 0.01), spread(0, 0.01, seed=1), {}, "better in 100 % of draw"),
    ("resolved_worse", spread(-0.05, 0.01), spread(0, 0.01, seed=1), {}, "worse in 100 % of draw"),
    ("better_on_average", spread(0.005, 0.01, 200), spread(0, 0.01, 200, seed=1), {}, "one draw"),
    ("coin_flip", spread(0.001, 0.02, 3), spread(0, 0.02, 3, seed=1), {}, "a coin flip at 3 draws"),
    ("likely_better", spread(0.02, 0.02, 3), spread(0, 0.01, 3, seed=4), {}, "not resolved at 3"),
    ("equivalent", spread(0, 0.005), spread(0, 0.004, seed=1), {"margin": 0.02}, "less than 2 poi"),
    ("identical", spread(0, 1), spread(0, 1), {}, "identical"),
    ("one_draw", spread(0.5, 0, 1), spread(0, 0, 1, seed=1), {}, "one draw: +50.0 points"),
    ("one_draw", [0.5], [0.4], {}, "one draw: +10.0 points; other draws"),
    ("no_spread", [0.5, 0.5], [0.4, 0.4], {}, "+10.0 points; nothing varies"),
]


@pytest.mark.parametrize(("kind", "a", "b", "arguments", "words"), CASES)
def test_every_kind_of_verdict(kind, a, b, arguments, words):
    found = comparison.verdict(a, b, **arguments)
    assert (found.kind, words in found.words) == (kind, True), found
    opposite = {"better": "worse", "worse": "better"}
    turned = re.sub("better|worse", lambda match: opposite[match[0]], kind)
    assert comparison.verdict(b, a, **arguments).kind == turned
    # Where less is better, the same numbers mean the opposite; and better always means better.
    assert comparison.verdict(a, b, higher_is_better=False, **arguments).kind == turned
    if kind.startswith("resolved") or kind.endswith("average"):
        assert found.more_draws == 0
    if kind in ("coin_flip", "likely_better"):
        assert f"{found.more_draws} more draw" in found.words or found.more_draws > 99
        assert found.more_draws == comparison.needed(a, b).draws - len(a)


def test_numbers_of_a_verdict_are_in_the_units_asked_for():
    a, b = spread(-0.05, 0.01), spread(0, 0.01, seed=1)
    found = comparison.verdict(a, b, higher_is_better=False, units=comparison.NATS)
    interval = comparison.two_level_bootstrap(a, b, expanded=True)
    numbers = f"-0.050 nats [{interval.low:.3f}, {interval.high:.3f}]"
    assert found.words == f"resolved, better: {numbers}, better in 100 % of draw pairs"
    assert comparison.POINTS.signed(-0.0001) == "0.0"
    assert comparison.POINTS.signed(0.0149) == "+1.5"
    assert comparison.Units("%", 100, 0).signed(0.5) == "+50"


def test_arms_without_data():
    rng = np.random.default_rng(5)
    dense = (rng.random((1, 500)) < 0.7).astype(float)
    low = np.where(rng.random((1, 500)) < 0.2, 0.0, dense)
    found = comparison.verdict(low, dense, data_free=("a", "b"))
    assert found.kind == "resolved_worse"
    assert "over 500 items, no draw varies" in found.words
    many = comparison.verdict(np.repeat(low, 4, 0), np.repeat(dense, 4, 0))
    assert (many.kind, many.more_draws) == ("resolved_worse", 0)
    close = dense.copy()
    close[0, :3] = 1 - close[0, :3]
    close[0, 3:5] = 1 - close[0, 3:5]
    found = comparison.verdict(close, dense, data_free=("a", "b"))
    assert found.kind == "unresolved"
    assert re.search(r"about [\d,]+ items needed", found.words)
    assert found.more_draws is None
    # One row of the dense model stands beside every draw.
    draws = spread(-0.1, 0.01, 6, 500)
    beside = comparison.verdict(draws, dense, data_free="b")
    assert beside == comparison.verdict(draws, np.repeat(dense, 6, 0))


def test_no_number_of_draws_tells_what_items_do_not():
    rng = np.random.default_rng(6)
    a = spread(0.001, 0.0005, 5)
    b = spread(0, 0.0005, 5, seed=1) + rng.normal(0, 0.1, 400)
    found = comparison.verdict(a, b)
    assert found.more_draws is None
    assert "no number of draws would resolve it on these items" in found.words
    same = comparison.verdict(a, b, margin=0.05)
    assert same.kind == "equivalent"


def test_equal_arms_are_seldom_called_different():
    rng, trials = np.random.default_rng(7), 120
    for draws, draw_sd, item_sd, answers in ((3, 0.3, 0.3, True), (5, 0.6, 0.0, False)):
        kinds = []
        for _ in range(trials):
            a, b = arms(rng, draws, 200, draw_sd, item_sd, answers=answers)
            kinds.append(comparison.verdict(a, b, resamples=300).kind)
        wrong = sum(kind.startswith("resolved") or kind.endswith("average") for kind in kinds)
        assert wrong / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
