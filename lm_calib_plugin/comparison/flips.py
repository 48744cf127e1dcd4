"""Which items two arms answer otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lm_calib_plugin.comparison.numbers import paired_table
from lm_calib_plugin.comparison.significance import p_value
from lm_calib_plugin.errors import UserError


@dataclass(frozen=True)
class Flips:
    """Shares of all pairs of an item and a draw; ``beneficial + harmful + ties == 1``.

    ``beneficial``: a right, b wrong; ``harmful``: a wrong, b right. ``p_value`` is that of
    :func:`~lm_calib_plugin.comparison.p_value`: exact McNemar for one draw.
    """

    draws: int
    items: int
    beneficial: float
    harmful: float
    ties: float
    p_value: float

    @property
    def net(self) -> float:
        """The difference of the two accuracies, a - b."""
        return self.beneficial - self.harmful

    @property
    def churn(self) -> float:
        """Share of the pairs that differ: the discordance."""
        return self.beneficial + self.harmful


def flips(a: ArrayLike, b: ArrayLike) -> Flips:
    """Count the items that only one of two arms gets right.

    Parameters
    ----------
    a, b
        ``[draws, items]`` of 0 and 1, of one shape; b is the arm that a is held against (dense).

    Raises
    ------
    UserError
        For other numbers than 0 and 1, or scores without items.
    """
    gaps = paired_table(a, b)
    if np.ndim(a) != 2 or not all(np.isin(np.asarray(arm), (0, 1)).all() for arm in (a, b)):
        raise UserError("a", f"got shape {np.shape(a)}", "draws by items of 0 and 1 are needed")
    beneficial, harmful = float((gaps > 0).mean()), float((gaps < 0).mean())
    found = p_value(a, b)
    return Flips(
        len(gaps),
        gaps.shape[1],
        beneficial,
        harmful,
        float((gaps == 0).mean()),
        # One item, one draw: a coin that fell once.
        1.0 if found is None else found,
    )
