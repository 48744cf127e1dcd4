"""Random effects: expected mean squares by hand, and a second likelihood."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from lm_calib_plugin import comparison

FACTORS = ("source", "method", "interaction", "draw")


def table(rng, sources, methods, draws, variances):
    """Return simulated scores ``[source, method, draw]``."""
    shapes = [(sources, 1, 1), (1, methods, 1), (sources, methods, 1), (sources, methods, draws)]
    parts = zip(variances, shapes, strict=True)
    return 60 + sum(math.sqrt(v) * rng.normal(size=shape) for v, shape in parts)


def test_expected_mean_squares_by_hand():
    # Two sources, two methods, two draws. Cell means 2, 6, 12, 20; each draw is 1 off its mean.
    draws = [[[1, 3], [5, 7]], [[11, 13], [19, 21]]]
    # Source means 4, 16; method means 7, 13; grand mean 10. Left of the cells: 1, -1, -1, 1.
    ms_draw = 8 * 1 / 4  # eight squares of 1 over 2 * 2 * (2 - 1)
    ms_both = 2 * (1 + 1 + 1 + 1) / 1
    ms_source = 4 * (36 + 36) / 1
    ms_method = 4 * (9 + 9) / 1
    found = comparison.variance_components(draws, resamples=0)
    assert found.estimator == "anova"
    assert [found.variances[name] for name in FACTORS] == pytest.approx(
        [(ms_source - ms_both) / 4, (ms_method - ms_both) / 4, (ms_both - ms_draw) / 2, ms_draw]
    )
    assert [found.variances[name] for name in FACTORS] == pytest.approx([70, 16, 3, 2])
    assert [found.shares[name].value for name in FACTORS] == pytest.approx(
        [70 / 91, 16 / 91, 3 / 91, 2 / 91]
    )
    assert found.truncated == ()


def test_a_negative_estimate_is_a_share_of_0_with_a_flag():
    draws = [[[1, 9], [2, 8]], [[0, 10], [5.5, 4.5]]]  # all means are 5
    found = comparison.variance_components(draws, resamples=0)
    assert found.variances["interaction"] < 0
    assert found.truncated == ("source", "method", "interaction")
    assert [found.shares[name].value for name in FACTORS] == [0, 0, 0, 1]
    reml = comparison.variance_components(draws, resamples=0, estimator="reml")
    assert reml.truncated == found.truncated
    assert [reml.shares[name].value for name in FACTORS] == pytest.approx([0, 0, 0, 1])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reml_is_anova_on_balanced_tables(seed):
    draws = table(np.random.default_rng(seed), 5, 3, 4, (1, 0.6, 0.4, 0.2))
    moments = comparison.variance_components(draws, resamples=0)
    assert moments.truncated == ()
    likelihood = comparison.variance_components(draws, resamples=0, estimator="reml")
    for name in FACTORS:
        assert likelihood.variances[name] == pytest.approx(moments.variances[name], rel=1e-3)


def test_reml_maximizes_the_likelihood_of_single_scores():
    # The textbook form, one row per score: log |V| + log |1' V^-1 1| + y' P y.
    rng = np.random.default_rng(4)
    full = table(rng, 4, 3, 4, (1, 0.6, 0.4, 0.2))
    draws = [[list(cell) for cell in row] for row in full]
    draws[0][1], draws[2][2], draws[3][0] = [], draws[2][2][:1], draws[3][0][:2]
    rows = [(i, j, y) for i, r in enumerate(draws) for j, cell in enumerate(r) for y in cell]
    y = np.array([row[2] for row in rows])
    labels = [[r[0] for r in rows], [r[1] for r in rows], [r[0] * 3 + r[1] for r in rows]]
    same = [np.equal.outer(x, x).astype(float) for x in map(np.array, labels)] + [np.eye(len(y))]

    def deviance(logs):
        v = sum(math.exp(x) * s for x, s in zip(logs, same, strict=True))
        inverse = np.linalg.inv(v)
        weight = inverse.sum()
        rest = y - inverse.sum(0) @ y / weight
        return np.linalg.slogdet(v)[1] + math.log(weight) + rest @ inverse @ rest

    best = optimize.minimize(deviance, np.log([1, 0.6, 0.4, 0.2]), method="Nelder-Mead", tol=1e-9)
    found = comparison.variance_components(draws, resamples=0)
    assert found.estimator == "reml"
    np.testing.assert_allclose(
        [found.variances[name] for name in FACTORS], np.exp(best.x), rtol=2e-3
    )


@pytest.mark.parametrize("estimator", ["anova", "reml"])
def test_simulated_variances_are_recovered(estimator):
    rng, truth, trials = np.random.default_rng(5), np.array([1.0, 0.5, 0.3, 0.2]), 40
    if estimator == "anova":
        trials = 400
    found = []
    for _ in range(trials):
        made = comparison.variance_components(
            table(rng, 12, 8, 4, truth), resamples=0, estimator=estimator
        )
        found.append([made.variances[name] for name in FACTORS])
    error = np.std(found, 0) / math.sqrt(trials)
    np.testing.assert_array_less(np.abs(np.mean(found, 0) - truth), 4 * error)


def test_naive_shares_hold_the_noise_of_the_draws():
    # Nothing but draws varies: the naive shares see sources, the components do not.
    rng = np.random.default_rng(6)
    naive, moments = [], []
    for _ in range(50):
        draws = table(rng, 4, 2, 3, (0, 0, 0, 1))
        naive.append(comparison.variance_shares_of_draws(draws).draw)
        moments.append(comparison.variance_components(draws, resamples=0).variances["source"])
    assert np.mean(naive) < 0.85
    assert abs(np.mean(moments)) < 4 * np.std(moments) / math.sqrt(50)


def test_one_method_leaves_source_and_draw():
    scores = table(np.random.default_rng(7), 6, 1, 5, (1, 0, 0, 0.5))[:, 0]
    between = 5 * scores.mean(1).var(ddof=1)
    within = scores.var(axis=1, ddof=1).mean()
    for draws in ([[row] for row in scores], [list(scores)]):
        found = comparison.variance_components(draws, resamples=0)
        name = "source" if len(draws) > 1 else "method"
        assert dict(found.variances) == pytest.approx(
            {name: (between - within) / 5, "draw": within}
        )
        other = comparison.variance_components(draws, resamples=0, estimator="reml")
        assert dict(other.variances) == pytest.approx(dict(found.variances), rel=1e-3)


def test_draws_that_never_vary():
    means = table(np.random.default_rng(8), 5, 4, 1, (1, 0.5, 0.3, 0))[..., 0]
    draws = np.repeat(means[..., None], 3, 2)
    moments = comparison.variance_components(draws, resamples=0)
    assert moments.variances["draw"] == 0
    other = comparison.variance_components(draws, resamples=0, estimator="reml")
    for name in FACTORS:
        assert other.variances[name] == pytest.approx(moments.variances[name], rel=1e-3)


def test_intervals_are_about_the_draws():
    rng = np.random.default_rng(9)
    effects = table(rng, 4, 3, 1, (1, 0.5, 0.3, 0))
    # Shares of these very sources and methods, with the draws' variance known.
    truth = comparison.variance_components(
        effects + math.sqrt(0.4) * np.array([-1, 1]) / math.sqrt(2), resamples=0
    ).variances
    total = sum(truth.values()) + 0.4 / 2  # the two draws' noise is not in these means
    held, trials = np.zeros(2), 40
    for trial in range(trials):
        draws = effects + math.sqrt(0.4) * rng.normal(size=(4, 3, 6))
        found = comparison.variance_components(draws, resamples=200, seed=trial).shares
        for place, (name, value) in enumerate(
            (("source", truth["source"]), ("interaction", truth["interaction"] + 0.4 / 2))
        ):
            held[place] += found[name].low <= value / total <= found[name].high
    assert (held / trials > 0.8).all()
    again = comparison.variance_components(draws, resamples=200, seed=trial).shares
    assert again == found
    missing = [[list(cell) for cell in row] for row in draws]
    missing[1][1] = []
    found = comparison.variance_components(missing, resamples=40)
    for share in found.shares.values():
        assert 0 <= share.low <= share.high <= 1


def test_reml_bears_resamples_in_which_a_component_vanishes():
    draws = [[[60.0], [70.0]], [[70.0, 70.5, 71.0], [80.0, 80.5, 81.0]]]
    shares = comparison.variance_components(draws, resamples=50).shares
    assert sum(share.value for share in shares.values()) == pytest.approx(1)
