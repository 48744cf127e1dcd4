"""Whether two arms are the same for practical purposes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from numpy.typing import ArrayLike
from scipy import stats

from lm_calib_plugin.comparison.items import crossed
from lm_calib_plugin.comparison.needed import MARGIN
from lm_calib_plugin.comparison.numbers import RESAMPLES, Interval, paired_table
from lm_calib_plugin.comparison.pairs import two_level_bootstrap
from lm_calib_plugin.errors import UserError

ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests (TOST) at 5 % each: the 90 % interval against the margin.

    ``items_needed`` (:func:`~lm_calib_plugin.comparison.items_needed`) would certify the margin
    with a chance of 80 % if the arms were equal, at the draws and the item noise seen here; None
    where draws alone spread too far for it, or items are not known.
    """

    equivalent: bool
    margin: float
    interval: Interval
    items_needed: int | None


def equivalence(
    a: ArrayLike,
    b: ArrayLike,
    margin: float = MARGIN,
    *,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    interval: Interval | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Equivalence:
    """Test whether a and b differ by less than a margin.

    Equivalent means that the 90 % two-level interval of the paired difference, expanded for few
    draws, lies inside ``(-margin, margin)``. One draw of each speaks about its items only.

    Parameters
    ----------
    a, b
        ``[draws, items]`` or ``[draws]``, of one shape.
    margin
        In units of the scores, declared before looking: 0.02 is two points of accuracy.
    weights
        ``[items]``, above 0.
    strata
        ``[items]``, the fixed block (task) of each.
    interval
        The 90 % interval, where it is known already.

    Raises
    ------
    UserError
        For a margin that is not above 0.
    """
    if not margin > 0:
        raise UserError("margin", f"got {margin}", "a number above 0, in units of the scores")
    if interval is None:
        interval = two_level_bootstrap(
            a, b, resamples, seed,
            weights=weights, strata=strata, confidence=1 - 2 * ALPHA, expanded=True,
        )  # fmt: skip
    spread = crossed(paired_table(a, b), weights, strata)
    count = None
    if spread.items is not None:
        quantile = float(stats.norm.ppf(1 - ALPHA) + stats.norm.ppf((1 + POWER) / 2))
        left = (margin / quantile) ** 2 - spread.draws_alone
        if left > 0:
            count = max(1, math.ceil(spread.items * spread.item_count / left))
    return Equivalence(interval.low > -margin and interval.high < margin, margin, interval, count)
