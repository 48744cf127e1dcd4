"""Arrays of scores, checked, and the interval that every estimate comes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lm_calib_plugin.errors import UserError

Array: TypeAlias = NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval, in units of the scores.

    95 % percentile bootstrap unless the function that returns it says otherwise.
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def finite(argument: str, values: ArrayLike, dimensions: int, least: int = 1) -> Array:
    """Return the values as float64; a missing one (NaN, a ragged row) is refused, never skipped.

    Raises
    ------
    UserError
        Also for another number of dimensions, or fewer than ``least`` values.
    """
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(
            argument, "rows of unequal length, or no numbers", "a full table of numbers is needed"
        ) from None
    if found.ndim != dimensions or found.size < least or not np.isfinite(found).all():
        raise UserError(
            argument,
            f"got shape {found.shape}" + ("" if np.isfinite(found).all() else ", not all finite"),
            f"{dimensions} dimension(s), at least {least} value(s), none missing, are needed",
        )
    return found


def differences(argument: str, a: ArrayLike, b: ArrayLike, dimensions: int) -> Array:
    """Return ``a - b`` of two arms with equal draws (and items)."""
    if np.shape(a) != np.shape(b):
        raise UserError(
            argument,
            f"shapes {np.shape(a)} and {np.shape(b)}",
            "pairs need the same draws and items in both arms",
        )
    return finite("a", a, dimensions) - finite("b", b, dimensions)


def draws_by_items(argument: str, values: ArrayLike) -> Array:
    """Return ``[draws, items]``; scores without items are one item."""
    if np.ndim(values) == 1:
        return finite(argument, values, 1)[:, None]
    return finite(argument, values, 2)


def paired_table(a: ArrayLike, b: ArrayLike) -> Array:
    """Return ``a - b`` as ``[draws, items]``."""
    gaps = differences("a", a, b, 1 if np.ndim(a) == 1 else 2)
    return gaps[:, None] if gaps.ndim == 1 else gaps


def item_weights(weights: ArrayLike, items: int) -> Array:
    """Return weights ``[items]``, all above 0.

    Raises
    ------
    UserError
        For another number of weights than items, or a weight that is not above 0.
    """
    found = finite("weights", weights, 1)
    if found.size != items or not (found > 0).all():
        raise UserError(
            "weights",
            f"{found.size} weight(s), smallest {found.min():g}",
            f"one weight above 0 for each of the {items} item(s) is needed",
        )
    return found


def blocks(strata: ArrayLike | None, items: int) -> list[NDArray[np.intp]]:
    """Return the places of the items of each stratum, by rising number; all, without strata.

    Raises
    ------
    UserError
        For another number of strata than items, or numbers that are not whole.
    """
    if strata is None:
        return [np.arange(items)]
    found = np.asarray(strata)
    if found.shape != (items,) or not np.issubdtype(found.dtype, np.integer):
        raise UserError(
            "strata",
            f"got shape {found.shape} of {found.dtype}",
            f"one whole number for each of the {items} item(s) is needed",
        )
    return [np.flatnonzero(found == number) for number in np.unique(found)]


def percentile_interval(value: float, resampled: Array, confidence: float = CONFIDENCE) -> Interval:
    """Return the estimate with the percentiles of its resampled values."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
