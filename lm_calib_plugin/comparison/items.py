"""Scores made of items: their mean, and how far other items would move it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lm_calib_plugin.comparison.numbers import (
    Array,
    blocks,
    draws_by_items,
    item_weights,
    paired_table,
)


@dataclass(frozen=True)
class Crossed:
    """Squared standard errors of a mean over draws and items, in squared units of the scores.

    ``draws`` is the variance of the scores of the draws over their number; ``items`` that of the
    means of the items over theirs (linearized, for weights; summed over strata). The noise of a
    draw on an item, ``both``, is in each of the two once. None where fewer than two draws, or items
    of a stratum, leave it open. ``item_freedom`` are the degrees of freedom of ``items``, by
    Satterthwaite for several strata.
    """

    value: float
    draw_count: int
    item_count: int
    draws: float | None
    items: float | None
    both: float
    item_freedom: float

    @property
    def items_alone(self) -> float:
        """What no number of draws takes away, 0 where it is not seen above the noise."""
        return max(0.0, (self.items or 0.0) - self.both)

    @property
    def draws_alone(self) -> float:
        """What no number of items takes away, 0 where it is not seen above the noise."""
        return max(0.0, (self.draws or 0.0) - self.both)


def item_scores(scores: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Return the score of each draw, ``[draws]``: ``sum(w x) / sum(w)`` over its items.

    Parameters
    ----------
    scores
        ``[draws, items]``, or ``[draws]``, which are returned as they are.
    weights
        ``[items]``, above 0: for the nats per word of documents, their words.
    """
    table = draws_by_items("scores", scores)
    if weights is None:
        return np.asarray(table.mean(1))
    return np.asarray(np.average(table, 1, item_weights(weights, table.shape[1])))


def item_error(
    a: ArrayLike,
    b: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
) -> float | None:
    """Return the standard error over items of the score, or of ``a - b``, averaged over draws.

    The standard deviation (``ddof=1``) of the items over the root of their number. With weights a
    score is a ratio, and its linearized standard error is that of ``w (x - score) / mean(w)``.
    It does not shrink with the number of draws, which are all judged on the same items.

    Parameters
    ----------
    a, b
        ``[draws, items]``.
    weights
        ``[items]``, above 0.
    strata
        ``[items]``, whole numbers: the fixed block (task) of each item. The squared error is then
        the sum of those of the blocks, times the squared shares of their weights.

    Returns
    -------
    float or None
        In units of the scores; None for fewer than two items, also of one stratum.
    """
    table = draws_by_items("a", a) if b is None else paired_table(a, b)
    parts = _strata(table.shape[1], weights, strata)
    if any(len(heavy) < 2 for _, heavy, _ in parts):
        return None
    squares = np.zeros(len(table))
    for places, heavy, share in parts:
        own, count = table[:, places], len(heavy)
        moves = (own - np.average(own, 1, heavy)[:, None]) * heavy / heavy.mean()
        # The mean of the moves of a draw is 0 but for rounding.
        squares += share**2 * (np.square(moves).sum(1) / (count - 1) / count)
    return float(np.sqrt(squares).mean())


def crossed(
    gaps: Array, weights: ArrayLike | None = None, strata: ArrayLike | None = None
) -> Crossed:
    """Split the error of the mean of a table ``[draws, items]`` into draws and items."""
    draws, items = gaps.shape
    parts = _strata(items, weights, strata)
    heavy = np.ones(items) if weights is None else item_weights(weights, items)
    value = float(np.average(gaps, 1, heavy).mean())
    rows, both = np.zeros(draws), 0.0
    errors: list[tuple[float, int]] = []
    for places, own_heavy, share in parts:
        own, count = gaps[:, places], len(own_heavy)
        center = float(np.average(own, 1, own_heavy).mean())
        moves = (own - center) * own_heavy / own_heavy.mean()
        own_rows, columns = moves.mean(1), moves.mean(0)
        rest = moves - own_rows[:, None] - columns + moves.mean()
        rows += share * own_rows
        if draws > 1 and count > 1:
            noise = float(np.square(rest).sum()) / ((draws - 1) * (count - 1)) / (draws * count)
            both += share**2 * noise
        if count > 1:
            errors.append((share**2 * (float(columns.var(ddof=1)) / count), count - 1))
    same = bool((gaps == gaps[0]).all())  # rounded means of equal draws must not differ
    return Crossed(
        value,
        draws,
        items,
        None if draws < 2 else 0.0 if same else float(rows.var(ddof=1)) / draws,
        None if len(errors) < len(parts) else sum(error for error, _ in errors),
        0.0 if same else both,
        _freedom(errors),
    )


def _strata(
    items: int, weights: ArrayLike | None, strata: ArrayLike | None
) -> list[tuple[NDArray[np.intp] | slice, Array, float]]:
    """Return the items of each stratum, their weights, and its share of all weights."""
    heavy = np.ones(items) if weights is None else item_weights(weights, items)
    found = blocks(strata, items)
    if len(found) == 1:
        return [(slice(None), heavy, 1.0)]
    return [(places, heavy[places], float(heavy[places].sum() / heavy.sum())) for places in found]


def _freedom(errors: list[tuple[float, int]]) -> float:
    """Return the degrees of freedom of a sum of squared errors, each with its own."""
    squares = sum(error**2 / freedom for error, freedom in errors)
    if len(errors) < 2 or not squares:
        return sum(freedom for _, freedom in errors)
    return sum(error for error, _ in errors) ** 2 / squares
