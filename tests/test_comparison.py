"""Statistics of comparisons: against published summaries, and against plain loops.

The published numbers (arXiv 2410.17711 and the per-seed values of its repository) reach us as
means and standard deviations of two decimals. Every tolerance below is derived: from that rounding
(each input may be off by 0.005, all at their worst at once), the rounding of the published result
and, where the result was counted over 20 actual draws and we have only their normal summary, the
scatter between the two (three standard deviations, simulated).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lm_calib_plugin import comparison
from lm_calib_plugin.errors import UserError

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
    assert shares(means, sds) * found.total == pytest.approx(
        [source, method, between - source - method, draw]
    )
    assert shares(means, sds).sum() == pytest.approx(1)


def test_variance_shares_of_draws_equal_those_of_their_summaries():
    rng = np.random.default_rng(6)
    draws = [[rng.normal(i, 1 + j, 5 + i + j) for j in range(2)] for i in range(3)]
    means = np.array([[d.mean() for d in row] for row in draws])
    sds = np.array([[math.sqrt(d.var(ddof=1)) for d in row] for row in draws])
    found = comparison.variance_shares_of_draws(draws)
    assert found.draw == pytest.approx(comparison.variance_shares(means, sds).draw)
    assert found.total == pytest.approx(comparison.variance_shares(means, sds).total)


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
    monkeypatch.setattr("lm_calib_plugin.comparison.pairs._CHUNK", 4000)
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


def test_retention():
    found = comparison.retention(
        {"code": 0.30, "math": 0.20, "trivia": 0.90},
        {"code": 0.40, "math": 0.80, "trivia": 0.50},
        {"trivia": 0.25},
    )
    assert dict(found.domains) == pytest.approx({"code": 0.75, "math": 0.25, "trivia": 1.2})
    assert (found.worst_domain, found.worst) == ("math", pytest.approx(0.25))
    assert found.geometric_mean == pytest.approx((0.75 * 0.25 * 1.2) ** (1 / 3))
    assert found.mean == pytest.approx(2.2 / 3)
    below = comparison.retention({"a": 0.0, "b": 1.0}, {"a": 0.5, "b": 1.0}, {"a": 0.25, "b": 0.0})
    assert below.worst == -0.2
    assert below.geometric_mean == 0.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: comparison.variance_shares([[1.0, np.nan]], [[1.0, 1.0]]), "not all finite"),
        (lambda: comparison.variance_shares([[1.0, 2.0]], [[1.0]]), "shape"),
        (lambda: comparison.variance_shares([[1.0, 1.0]], [[0.0, 0.0]]), "something must vary"),
        (lambda: comparison.variance_shares([[1.0], [1.0, 2.0]], [[1.0]]), "unequal length"),
        (lambda: comparison.variance_shares_of_draws([[[1, 2]], [[1, 2], [2, 3]]]), "missing"),
        (lambda: comparison.draw_spread([1.0]), "at least 2"),
        (lambda: comparison.spearman([1, 1, 1], [1, 2, 3]), "rank nothing"),
        (lambda: comparison.winner_flips([1, 2], [1, 2, 3]), "same draws"),
        (lambda: comparison.expected_tau([[1.0, 2.0], [1.5]]), "all means are equal"),
        (lambda: comparison.retention({"a": 1.0}, {"b": 1.0}), "domains differ"),
        (lambda: comparison.retention({"a": 0.2}, {"a": 0.25}, {"a": 0.25}), "above chance"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_the_global_generator_is_left_alone():
    before = np.random.get_state()[1].copy()
    comparison.two_level_bootstrap([1.0, 2.0, 3.0])
    comparison.expected_tau([[1.0, 2.0], [3.0, 1.0]])
    np.testing.assert_array_equal(before, np.random.get_state()[1])
