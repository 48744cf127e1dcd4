"""What is left of the dense model."""

from __future__ import annotations

import numpy as np
import pytest

from lm_calib_plugin import comparison


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


def test_recovery():
    found = comparison.recovery(
        {"boolq": 0.6, "piqa": 0.8, "ppl": 20.0},
        {"boolq": 0.8, "piqa": 0.78, "ppl": 15.0},
        lower_is_better=["ppl"],
    )
    assert dict(found.tasks) == pytest.approx({"boolq": 0.75, "piqa": 0.8 / 0.78, "ppl": 0.75})
    assert found.mean == pytest.approx((0.75 + 0.8 / 0.78 + 0.75) / 3)
    assert (found.worst_task, found.worst) == ("boolq", pytest.approx(0.75))


def test_controls_must_not_vary_at_all():
    items = np.random.default_rng(1).normal(0, 1, 30)
    assert comparison.control_noise(np.tile(items, (4, 1))) == 0.0
    noisy = np.tile(items, (4, 1))
    noisy[2, 7] = np.nextafter(noisy[2, 7], 9)  # one last bit of one item
    assert comparison.control_noise(noisy) == noisy[2, 7] - items[7] > 0
    noisy[3, 8] -= 0.25
    assert comparison.control_noise(noisy) == pytest.approx(0.25)
    # Draws whose means agree may still answer other items.
    assert comparison.control_noise([[1, 0], [0, 1]]) == 1.0
    assert comparison.control_noise([0.5, 0.5]) == 0.0
