"""What varies: shares of the variance of a table of cells, and the spread of one cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lm_calib_plugin.comparison.numbers import RESAMPLES, Interval, finite, percentile_interval
from lm_calib_plugin.errors import UserError


@dataclass(frozen=True)
class VarianceShares:
    """Shares of the variance of one draw's score, fractions that sum to 1.

    ``total`` is that variance itself, in squared units of the scores.
    """

    source: float
    method: float
    interaction: float
    draw: float
    total: float


@dataclass(frozen=True)
class DrawSpread:
    """How far draws of one cell lie apart, in units of the scores.

    ``sd`` has ``ddof=1`` and is exactly 0 when all draws agree; ``sd_interval`` is its bootstrap
    interval, which tends to be low for few draws.
    """

    draws: int
    mean: float
    sd: float
    lowest: float
    highest: float
    sd_interval: Interval

    @property
    def range(self) -> float:
        """Highest minus lowest."""
        return self.highest - self.lowest


def variance_shares(means: ArrayLike, sds: ArrayLike) -> VarianceShares:
    """Split the variance of a table of cells into source, method, interaction and draw.

    Source and method: population variance of the marginal means. Interaction: mean square of what
    the two leave of the cell means. Draw: mean variance inside the cells. Not corrected for bias
    (draw noise inflates the other three by its n-th part), so that published tables compare.

    Parameters
    ----------
    means, sds
        ``[source, method]``, mean and standard deviation (``ddof=1``) over the draws of each
        cell.

    Raises
    ------
    UserError
        When a cell is missing, the shapes differ or nothing varies.
    """
    cells, spread = finite("means", means, 2), finite("sds", sds, 2)
    if cells.shape != spread.shape or (spread < 0).any():
        raise UserError(
            "sds", f"got shape {spread.shape}", f"numbers >= 0 of shape {cells.shape} are needed"
        )
    rows, columns, grand = cells.mean(1), cells.mean(0), cells.mean()
    rest = cells - rows[:, None] - columns + grand
    parts = [
        float(np.mean(np.square(part))) for part in (rows - grand, columns - grand, rest, spread)
    ]
    total = sum(parts)
    if total <= 0:
        raise UserError("means", "all cells are equal and no draw varies", "something must vary")
    source, method, interaction, draw = (part / total for part in parts)
    return VarianceShares(source, method, interaction, draw, total)


def variance_shares_of_draws(draws: Sequence[Sequence[ArrayLike]]) -> VarianceShares:
    """Like :func:`variance_shares`, of the scores themselves.

    Parameters
    ----------
    draws
        ``draws[source][method]`` holds the scores of a cell, at least two; cells may differ in
        number.
    """
    if len({len(row) for row in draws}) != 1:
        raise UserError("draws", "a cell is missing", "every source with every method is needed")
    cells = [[finite("draws", cell, 1, least=2) for cell in row] for row in draws]
    means = [[cell.mean() for cell in row] for row in cells]
    return variance_shares(means, [[cell.std(ddof=1) for cell in row] for row in cells])


def draw_spread(draws: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> DrawSpread:
    """Return mean, standard deviation (``ddof=1``) and extremes of the scores of one cell.

    Parameters
    ----------
    draws
        ``[draws]``, at least two.
    """
    scores = finite("draws", draws, 1, least=2)
    lowest, highest = float(scores.min()), float(scores.max())
    if lowest == highest:  # the mean of equal numbers is rounded; the spread must still be 0
        return DrawSpread(len(scores), lowest, 0.0, lowest, highest, Interval(0.0, 0.0, 0.0))
    rng = np.random.default_rng(seed)
    again = scores[rng.integers(len(scores), size=(resamples, len(scores)))]
    sd = float(scores.std(ddof=1))
    return DrawSpread(
        len(scores),
        float(scores.mean()),
        sd,
        lowest,
        highest,
        percentile_interval(sd, again.std(1, ddof=1)),
    )
