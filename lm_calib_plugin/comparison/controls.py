"""What must not vary: data-free methods over draws, and the same cell run twice."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lm_calib_plugin.comparison.numbers import draws_by_items
from lm_calib_plugin.errors import UserError


def control_noise(draws_items: ArrayLike) -> float:
    """Return the largest difference between draws on one item; exactly 0 is what it must be.

    For all draws of a data-free method, and for a cell and its repeat. Anything above 0 is noise
    of the implementation, and a table that has it ranks nothing.

    Parameters
    ----------
    draws_items
        ``[draws, items]`` or ``[draws]``, at least two draws.
    """
    table = draws_by_items("draws_items", draws_items)
    if len(table) < 2:
        raise UserError("draws_items", f"{len(table)} draw(s)", "two draws or more are needed")
    return float(np.ptp(table, axis=0).max())
