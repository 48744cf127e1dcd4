"""How many more items, or draws, a question takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from numpy.typing import ArrayLike
from scipy import stats

from lm_calib_plugin.comparison.items import Crossed, crossed
from lm_calib_plugin.comparison.numbers import CONFIDENCE, finite, paired_table
from lm_calib_plugin.errors import UserError

MARGIN = 0.02
MOST_DRAWS = 10_000


@dataclass(frozen=True)
class Needed:
    """What would tell two arms apart on average, were the observed numbers the true ones.

    ``draws`` in all, on the same items; None where no number of draws (up to 10,000) would. Then
    ``items`` is the number of items that would do with any number of draws; None for no difference
    at all, or where items are not known.
    """

    draws: int | None
    items: int | None


def items_needed(
    variance: float,
    margin: float = MARGIN,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    both_sides: bool = True,
) -> int:
    """Return how many items certify that two arms differ by less than a margin, if they are equal.

    ``ceil(q ** 2 * variance / margin ** 2)`` with ``q = z(1 - alpha) + z(1 - (1 - power) / 2)`` for
    two one-sided tests. For one side, "not worse by more than", ``q = z(1 - alpha) + z(power)``:
    with it the published numbers for +-2 points come out of round discordances (1,855 items from
    0.12, MMLU's 2,164 from 0.14, GSM8K's 1,184 from 101 of 1,319, WinoGrande's 1,416 from 116 of
    1,267), so it is what they were computed with, as far as one can tell from the results.

    Parameters
    ----------
    variance
        Of the paired difference over items. For one draw of 0/1 items and equal accuracies it is
        the discordance, the share of items that flip.
    margin
        In units of the scores.
    alpha, power
        Level of each one-sided test, and the chance to succeed.
    """
    if not (variance >= 0 and margin > 0 and 0 < alpha < 0.5 and 0 < power < 1):
        raise UserError(
            "margin",
            f"variance {variance:g}, margin {margin:g}, alpha {alpha:g}, power {power:g}",
            "a variance >= 0, a margin > 0, alpha in (0, 0.5) and power in (0, 1) are needed",
        )
    reach = 1 - (1 - power) / 2 if both_sides else power
    quantile = float(stats.norm.ppf(1 - alpha) + stats.norm.ppf(reach))
    return max(1, math.ceil(quantile**2 * variance / margin**2))


def draws_needed(
    delta: float, draw_sd: float, item_error: float = 0.0, noise_sd: float = 0.0
) -> int | None:
    """Return at how many draws the expanded interval of the mean difference would exclude 0.

    The smallest ``K >= 2`` with ``t(K - 1) ** 2 * draw_sd ** 2 / K + z ** 2 * (item_error ** 2 + 2
    * noise_sd ** 2 / K) < delta ** 2``, which is the interval of
    :func:`~lm_calib_plugin.comparison.two_level_bootstrap` with ``expanded``.

    Parameters
    ----------
    delta
        The observed difference of the means.
    draw_sd
        Of the paired difference over draws; of two arms that are not paired, the root of the sum
        of their squares.
    item_error
        The part of the standard error over items that all draws share.
    noise_sd
        The part of ``draw_sd`` that is noise of a draw on single items.

    Returns
    -------
    int or None
        None where no number up to 10,000 would: nothing differs, or the items are too few.
    """
    finite("delta", [delta, draw_sd, item_error, noise_sd], 1)
    tail = (1 + CONFIDENCE) / 2
    z = float(stats.norm.ppf(tail))

    def excludes_zero(count: int) -> bool:
        t = float(stats.t.ppf(tail, count - 1))
        items = z**2 * (item_error**2 + 2 * noise_sd**2 / count)
        return t**2 * draw_sd**2 / count + items < delta**2

    if not excludes_zero(MOST_DRAWS):
        return None
    low, high = 1, MOST_DRAWS  # the interval only gets shorter
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if excludes_zero(middle) else (middle, high)
    return high


def needed(
    a: ArrayLike,
    b: ArrayLike,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
) -> Needed:
    """Return how many draws, or else items, would tell a from b on average.

    Parameters
    ----------
    a, b
        ``[draws, items]`` or ``[draws]``, of one shape. Draws of a single one, or that all agree,
        are taken not to vary.
    weights
        ``[items]``, above 0.
    strata
        ``[items]``, the fixed block (task) of each; items are then needed in the same proportions.
    """
    return needed_for(crossed(paired_table(a, b), weights, strata))


def needed_for(spread: Crossed) -> Needed:
    """Return :func:`needed` of a difference that is split already."""
    one_draw = spread.draw_count * (spread.draws or 0.0)
    noise = spread.draw_count * spread.both
    draws = draws_needed(
        spread.value, math.sqrt(one_draw), math.sqrt(spread.items_alone), math.sqrt(noise)
    )
    if draws is not None or not spread.value or spread.items is None:
        return Needed(draws, None)
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    ratio = z**2 * spread.items_alone / spread.value**2
    return Needed(None, math.ceil(ratio * spread.item_count) + 1 if ratio >= 1 else None)
