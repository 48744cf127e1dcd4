"""Many comparisons in one table."""

from __future__ import annotations

from collections.abc import Sequence

from lm_calib_plugin.errors import UserError


def holm(p_values: Sequence[float | None]) -> tuple[float | None, ...]:
    """Return Holm's step-down adjusted p values, in the order given.

    The k-th smallest of n is multiplied by ``n - k + 1``, is at most 1 and never below the one
    before it. None (nothing was tested) stays None and does not count.

    Raises
    ------
    UserError
        For a number outside [0, 1].
    """
    for value in p_values:
        if value is not None and not 0 <= value <= 1:
            raise UserError("p_values", f"got {value}", "numbers in [0, 1], or None, are needed")
    order = sorted((value, place) for place, value in enumerate(p_values) if value is not None)
    found: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for step, (value, place) in enumerate(order):
        largest = max(largest, min(1.0, value * (len(order) - step)))
        found[place] = largest
    return tuple(found)
