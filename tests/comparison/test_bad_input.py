"""Bad input is refused; no global state is touched."""

from __future__ import annotations

import numpy as np
import pytest

from lm_calib_plugin import comparison
from lm_calib_plugin.errors import UserError


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
        (lambda: comparison.retention({}, {}), "domains differ"),
        (lambda: comparison.recovery({"a": 1.0}, {"b": 1.0}), "tasks differ"),
        (lambda: comparison.recovery({"a": 1.0}, {"a": 1.0}, ["b"]), "tasks differ"),
        (lambda: comparison.recovery({"a": 1.0}, {"a": 0.0}), "divides by it"),
        (lambda: comparison.recovery({"a": 0.0}, {"a": 1.0}, ["a"]), "scores: a: 0"),
        (lambda: comparison.control_noise([[1.0, 2.0]]), "two draws"),
        (lambda: comparison.item_error([[1.0, 2.0]], weights=[1.0]), "1 weight"),
        (lambda: comparison.item_scores([[1.0, 2.0]], [1.0, 0.0]), "above 0"),
        (lambda: comparison.two_level_bootstrap([[1.0]], weights=[-1.0]), "above 0"),
        (lambda: comparison.mcnemar(-1, 2), "counts >= 0"),
        (lambda: comparison.sign_flip([0.5]), "whole numbers"),
        (lambda: comparison.p_value([[1, 0]], [[1, 0], [0, 1]]), "same draws"),
        (lambda: comparison.items_needed(-0.1), "variance -0.1"),
        (lambda: comparison.items_needed(0.1, 0.0), "margin 0"),
        (lambda: comparison.draws_needed(np.nan, 1.0), "not all finite"),
        (lambda: comparison.equivalence([1.0], [1.0], 0), "above 0"),
        (lambda: comparison.verdict([1.0], [1.0], data_free=["c"]), "data_free"),
        (lambda: comparison.verdict([1.0, 2], [1.0, 2], data_free=["a"]), "implementation"),
        (lambda: comparison.verdict([1.0, 2], [1.0]), "same draws"),
        (lambda: comparison.variance_components([[[1, 2]], [[1], []]]), "unequal length"),
        (lambda: comparison.variance_components([[[1], [2]], [[1], [3]]]), "two draws"),
        (lambda: comparison.variance_components([[[1, 2], []], [[3, 4], []]]), "no draws"),
        (lambda: comparison.variance_components([[[1, 2], []], [[], [3, 4]]]), "too few"),
        (lambda: comparison.variance_components([[[1, 2]]]), "too few"),
        (lambda: comparison.variance_components([[[1, 1]], [[1, 1]]]), "something must vary"),
        (
            lambda: comparison.variance_components([[[1, 2]], [[1, 2, 3]]], estimator="anova"),
            "not balanced",
        ),
        (lambda: comparison.variance_components([[[1, 2]], [[1, 3]]], estimator="ml"), "got ml"),
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
