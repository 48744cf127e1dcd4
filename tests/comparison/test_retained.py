"""What is left of the dense model."""

from __future__ import annotations

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
