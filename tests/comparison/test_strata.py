"""Items of several tasks: what differs between tasks is no noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lm_calib_plugin import comparison
from lm_calib_plugin.comparison.items import crossed
from lm_calib_plugin.errors import UserError

SIZES = (300, 40)
TASKS = np.repeat([0, 1], SIZES)
# Each task weighs the same in sum, as in the mean of tasks.
EVEN = np.concatenate([np.full(n, 1 / n) for n in SIZES])


def table(seed: int, draws: int = 4):
    """Return 0/1 items of an easy and a hard task."""
    rng = np.random.default_rng(seed)
    chances = np.where(TASKS == 0, 0.95, 0.25) + 0.02 * rng.normal(size=(draws, 1))
    return (rng.random((draws, len(TASKS))) < chances).astype(float)


def test_squared_errors_of_tasks_are_added_up():
    scores = table(1)
    parts = [scores[:, task == TASKS] for task in (0, 1)]
    errors = [
        math.hypot(*(stats.sem(draw) / 2 for draw in pair)) for pair in zip(*parts, strict=True)
    ]
    found = comparison.item_error(scores, weights=EVEN, strata=TASKS)
    assert found == pytest.approx(np.mean(errors))
    assert found < 0.8 * comparison.item_error(scores, weights=EVEN)
    own = [crossed(part) for part in parts]
    both = crossed(scores, EVEN, TASKS)
    assert both.items == pytest.approx(sum(one.items for one in own) / 4)
    assert both.both == pytest.approx(sum(one.both for one in own) / 4)
    assert both.draws == pytest.approx(stats.sem(comparison.item_scores(scores, EVEN)) ** 2)
    # Satterthwaite: between that of the task with the larger error and that of all items.
    v = [one.items / 4 for one in own]
    freedom = sum(v) ** 2 / sum(x**2 / (n - 1) for x, n in zip(v, SIZES, strict=True))
    assert both.item_freedom == pytest.approx(freedom)
    assert 39 <= freedom <= 338


def test_a_thousand_items_each_of_an_easy_and_a_hard_task():
    right = np.zeros((1, 2000))
    right[0, :950] = right[0, 1000:1250] = 1
    tasks = np.repeat([3, 7], 1000)
    error = comparison.item_error(right, strata=tasks)
    by_hand = math.sqrt((0.95 * 0.05 + 0.25 * 0.75) / 999) / 2
    assert error == pytest.approx(by_hand)
    found = comparison.two_level_bootstrap(right, strata=tasks)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * by_hand, rel=0.06)
    pooled = comparison.two_level_bootstrap(right)
    assert (pooled.high - pooled.low) > 1.3 * (found.high - found.low)


def test_order_and_names_of_tasks_do_not_matter_and_one_task_is_none():
    scores, mixed = table(2), np.random.default_rng(3).permutation(len(TASKS))
    options = [(scores, EVEN, TASKS), (scores[:, mixed], EVEN[mixed], 5 * TASKS[mixed] - 2)]
    errors = [comparison.item_error(s, weights=w, strata=t) for s, w, t in options]
    assert errors[0] == pytest.approx(errors[1])
    intervals = [comparison.two_level_bootstrap(s, weights=w, strata=t) for s, w, t in options]
    assert intervals[0].low == pytest.approx(intervals[1].low, abs=0.01)
    one = np.ones(len(TASKS), dtype=int)
    for weights in (None, EVEN):
        plain = comparison.two_level_bootstrap(scores, weights=weights)
        assert comparison.two_level_bootstrap(scores, weights=weights, strata=one) == plain
        assert crossed(scores, weights, one) == crossed(scores, weights)
        assert crossed(scores, weights).item_freedom == len(TASKS) - 1


def test_stratified_bootstrap_against_a_loop():
    rng = np.random.default_rng(4)
    scores, words = rng.normal(3, 1, (3, 30)), rng.integers(1, 50, 30).astype(float)
    scores[:, 20:] += 5
    tasks = np.repeat([0, 1], (20, 10))
    share = np.array([words[tasks == t].sum() for t in (0, 1)]) / words.sum()
    means = []
    for _ in range(4000):
        draws = rng.integers(0, 3, 3)
        total = 0.0
        for task in (0, 1):
            items = rng.choice(np.flatnonzero(tasks == task), int((tasks == task).sum()))
            total += share[task] * np.average(scores[draws][:, items].mean(0), weights=words[items])
        means.append(total)
    found = comparison.two_level_bootstrap(scores, resamples=4000, weights=words, strata=tasks)
    assert found.value == pytest.approx(comparison.item_scores(scores, words).mean())
    allowed = 4 * math.sqrt(2) * 0.042 * np.std(means)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=allowed)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=allowed)


def test_stratified_intervals_hold_the_truth_and_pooled_ones_are_too_long():
    rng = np.random.default_rng(5)
    held = np.zeros(2)
    for trial in range(200):
        scores = (rng.random((1, len(TASKS))) < np.where(TASKS == 0, 0.95, 0.25)).astype(float)
        for place, strata in enumerate((TASKS, None)):
            found = comparison.two_level_bootstrap(
                scores, resamples=300, seed=trial, weights=EVEN, strata=strata
            )
            held[place] += found.low <= 0.6 <= found.high
    assert 0.89 <= held[0] / 200 <= 0.985
    assert held[1] >= held[0]


def test_p_values_hold_their_level():
    rng = np.random.default_rng(6)
    found = []
    for _ in range(300):
        # Nothing on average; each task by itself differs.
        gaps = rng.normal(np.where(TASKS == 0, 0.5, -0.5), 1, (1, len(TASKS)))
        found.append(comparison.p_value(gaps, 0 * gaps, EVEN, TASKS))
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.09


@pytest.mark.parametrize("weights", [None, EVEN])
@pytest.mark.parametrize("strata", [None, TASKS])
def test_shared_resamples_give_the_intervals_of_single_calls(weights, strata):
    a, b = table(7), table(8)
    taken = comparison.Resampling(4, len(TASKS), weights=weights, strata=strata)
    moved = taken.scores([a, b, b[:1]])
    options = {"weights": weights, "strata": strata, "expanded": True}
    for confidence in (0.9, 0.95):
        for other, scores in ((b, moved[1]), (np.repeat(b[:1], 4, 0), moved[2])):
            one = comparison.two_level_bootstrap(a, other, confidence=confidence, **options)
            many = taken.interval(one.value, moved[0], scores, confidence)
            assert (many.low, many.high) == pytest.approx((one.low, one.high), abs=1e-12)
    known = [taken.interval(float((a - b).mean()), *moved[:2], c) for c in (0.95, 0.9)]
    if weights is None:
        said = comparison.verdict(a, b, strata=strata, margin=0.02, intervals=tuple(known))
        assert said == comparison.verdict(a, b, strata=strata, margin=0.02)


def test_arms_that_differ_on_one_item_do_not_differ_by_rounding():
    a = np.random.default_rng(9).random((3, 40))
    b = a.copy()
    b[1, 5] -= 0.5
    taken = comparison.Resampling(3, 40, weights=np.arange(1.0, 41.0))
    found = taken.interval(1.0, *taken.scores([a, b]))
    assert found.low <= 0
    assert not found.excludes_zero


@pytest.mark.parametrize("strata", [[0] * 5, [0.5] * len(TASKS), ["a"] * len(TASKS)])
def test_strata_that_do_not_fit_are_refused(strata):
    with pytest.raises(UserError, match="strata"):
        comparison.item_error(table(1), strata=strata)


def test_a_task_of_one_item_leaves_the_error_open():
    scores = table(1)[:, :6]
    assert comparison.item_error(scores, strata=[0, 0, 0, 0, 0, 1]) is None
    assert crossed(scores, None, [0, 0, 0, 0, 0, 1]).items is None
