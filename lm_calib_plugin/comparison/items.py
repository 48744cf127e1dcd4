"""Scores made of items: their mean, and how far other items would move it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lm_calib_plugin.comparison.numbers import Array, draws_by_items, item_weights, paired_table


@dataclass(frozen=True)
class Crossed:
    """Squared standard errors of a mean over draws and items, in squared units of the scores.

    ``draws`` is the variance of the scores of the draws over their number; ``items`` that of the
    means of the items over theirs (linearized, for weights). The noise of a draw on an item,
    ``both``, is in each of the two once. None where fewer than two draws, or items, leave it open.
    """

    value: float
    draw_count: int
    item_count: int
    draws: float | None
    items: float | None
    both: float

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
    a: ArrayLike, b: ArrayLike | None = None, weights: ArrayLike | None = None
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

    Returns
    -------
    float or None
        In units of the scores; None for fewer than two items.
    """
    table = draws_by_items("a", a) if b is None else paired_table(a, b)
    count = table.shape[1]
    if count < 2:
        return None
    heavy = np.ones(count) if weights is None else item_weights(weights, count)
    moves = (table - np.average(table, 1, heavy)[:, None]) * heavy / heavy.mean()
    # The mean of the moves of a draw is 0 but for rounding.
    return float(np.sqrt(np.square(moves).sum(1) / (count - 1) / count).mean())


def crossed(gaps: Array, weights: ArrayLike | None = None) -> Crossed:
    """Split the error of the mean of a table ``[draws, items]`` into draws and items."""
    draws, items = gaps.shape
    heavy = np.ones(items) if weights is None else item_weights(weights, items)
    value = float(np.average(gaps, 1, heavy).mean())
    moves = (gaps - value) * heavy / heavy.mean()
    rows, columns = moves.mean(1), moves.mean(0)
    rest = moves - rows[:, None] - columns + moves.mean()
    both = 0.0
    if draws > 1 and items > 1:
        both = float(np.square(rest).sum()) / ((draws - 1) * (items - 1)) / (draws * items)
    same = bool((gaps == gaps[0]).all())  # rounded means of equal draws must not differ
    return Crossed(
        value,
        draws,
        items,
        None if draws < 2 else 0.0 if same else float(rows.var(ddof=1)) / draws,
        None if items < 2 else float(columns.var(ddof=1)) / items,
        0.0 if same else both,
    )
