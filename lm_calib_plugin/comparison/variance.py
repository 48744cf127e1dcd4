"""Random effects: how much of a score's variance is the source's, the method's and the draw's.

The shares of :func:`~lm_calib_plugin.comparison.variance_shares` are those of published tables;
these have the noise of the draws taken out of the other parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from lm_calib_plugin.comparison.numbers import Array, Interval, finite, percentile_interval
from lm_calib_plugin.errors import UserError

_STARTS = (1.0, 0.1, 10.0)


@dataclass(frozen=True)
class VarianceComponents:
    """Components of a crossed random-effects model, and their shares.

    ``shares``: of ``source``, ``method``, ``interaction`` and ``draw``, those that the table can
    tell apart; fractions that sum to 1, with 95 % bootstrap intervals. ``variances``: the estimates
    themselves, in squared units of the scores, below 0 where the moments say so. ``truncated``:
    those not above 0, shown as a share of 0. ``estimator``: ``anova`` or ``reml``.
    """

    shares: Mapping[str, Interval]
    variances: Mapping[str, float]
    truncated: tuple[str, ...]
    estimator: str


@dataclass(frozen=True)
class _Table:
    """Sufficient statistics: what the estimates need to know of the draws.

    ``noise`` is by how much of the draw variance the mean of a cell varies, 1 / draws.
    """

    means: Array
    noise: Array
    sources: Array
    methods: Array
    within: float
    freedom: int

    @property
    def factors(self) -> dict[str, Array]:
        """Indicators ``[cells, levels]``; a factor of one level is not in the model."""
        found = {}
        for name, labels in (("source", self.sources), ("method", self.methods)):
            if labels.max() > 0:
                found[name] = np.eye(labels.max() + 1)[labels]
        if len(found) == 2:
            found["interaction"] = np.eye(len(self.means))
        return found


def variance_components(
    draws: Sequence[Sequence[ArrayLike]],
    *,
    estimator: str | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> VarianceComponents:
    """Estimate the variances of source, method, their interaction, and draws within cells.

    Balanced tables by equating mean squares to what they are expected to be (ANOVA estimators);
    else by restricted maximum likelihood, which equals them on balanced tables when none is
    negative. With one method (or one source) that factor and the interaction are left out.

    Intervals are percentiles over resamples of the draws within each cell, whose deviations are
    scaled by ``sqrt(n / (n - 1))``, and whose cell means are told to carry the noise of the draws
    twice. Sources and methods are not resampled, as there are few of them: the intervals are about
    these sources and methods and hold no guess about others.

    Draws are taken as independent between cells. Where one calibration set serves several methods,
    what they share of a draw is counted as the source's, divided by the number of draws.

    Parameters
    ----------
    draws
        ``draws[source][method]`` holds the scores of a cell; an empty one is missing.
    estimator
        ``anova`` or ``reml``; None takes ANOVA when all cells have equally many draws.
    resamples
        Of the draws; 0 leaves the intervals at the estimates.

    Raises
    ------
    UserError
        When nothing varies, no cell has two draws, a source or method has no cell, too few cells
        are there to tell the interaction from the rest, or ANOVA is asked of an unbalanced table.
    """
    cells, sources, methods = _cells(draws)
    counts = np.array([len(cell) for cell in cells])
    balanced = len(cells) == len(draws) * len(draws[0]) and len(set(counts)) == 1
    kind = estimator or ("anova" if balanced else "reml")
    if kind not in ("anova", "reml") or (kind == "anova" and not balanced):
        raise UserError(
            "estimator",
            f"got {kind}" + ("" if balanced else " for a table that is not balanced"),
            "`anova` (equally many draws in every cell) and `reml` are known",
        )
    table = _Table(
        np.array([cell.mean() for cell in cells]),
        1 / counts,
        sources,
        methods,
        sum(float(np.square(cell - cell.mean()).sum()) for cell in cells if np.ptp(cell) > 0),
        int(counts.sum()) - len(cells),
    )
    variances = _anova(table) if kind == "anova" else _reml(table)
    shares = _shares(variances)
    rng = np.random.default_rng(seed)
    again = [shares]
    if resamples:
        tables = [_resample(table, cells, rng) for _ in range(resamples)]
        again = [_anova(t) if kind == "anova" else _reml(t, variances) for t in tables]
        again = [_shares(found) for found in again]
    return VarianceComponents(
        {n: percentile_interval(shares[n], np.array([s[n] for s in again])) for n in shares},
        variances,
        tuple(n for n, found in variances.items() if n != "draw" and found <= 0),
        kind,
    )


def _cells(draws: Sequence[Sequence[ArrayLike]]) -> tuple[list[Array], Array, Array]:
    """Return the cells that are there, with the numbers of their source and method."""
    if len({len(row) for row in draws}) != 1:
        raise UserError("draws", "rows of unequal length", "an empty cell stands for a missing one")
    found = [
        (finite("draws", cell, 1), source, method)
        for source, row in enumerate(draws)
        for method, cell in enumerate(row)
        if np.size(np.asarray(cell))
    ]
    cells = [cell for cell, _, _ in found]
    sources, methods = (np.array([entry[axis] for entry in found]) for axis in (1, 2))
    levels = len(draws), len(draws[0])
    if len(set(sources)) < levels[0] or len(set(methods)) < levels[1]:
        raise UserError("draws", "a source or method has no draws", "leave it out")
    if max(map(len, cells)) < 2:
        raise UserError("draws", "no cell has two draws", "the draws' variance needs two of a cell")
    if len(cells) < 2 or (min(levels) > 1 and len(cells) < sum(levels)):
        raise UserError(
            "draws",
            f"{len(cells)} cell(s) of {levels[0]} sources and {levels[1]} methods",
            "too few to tell what varies",
            "run the cells that are missing",
        )
    scores = np.concatenate(cells)
    if np.ptp(scores) == 0:
        raise UserError("draws", "all scores are equal", "something must vary")
    return cells, sources, methods


def _resample(table: _Table, cells: list[Array], rng: np.random.Generator) -> _Table:
    means, noise, within = [], [], 0.0
    for cell, mean, share in zip(cells, table.means, table.noise, strict=True):
        count = len(cell)
        if count > 1:
            moved = (cell - mean)[rng.integers(count, size=count)] * np.sqrt(count / (count - 1))
            within += float(np.square(moved - moved.mean()).sum())
            mean, share = mean + moved.mean(), 2 * share
        means.append(mean)
        noise.append(share)
    return _Table(
        np.array(means), np.array(noise), table.sources, table.methods, within, table.freedom
    )


def _shares(variances: Mapping[str, float]) -> dict[str, float]:
    kept = {name: max(0.0, value) for name, value in variances.items()}
    total = sum(kept.values())
    return {name: value / total if total else 0.0 for name, value in kept.items()}


def _anova(table: _Table) -> dict[str, float]:
    """Return the moment estimates of a balanced table, from its cell means.

    Variances of marginal means (``ddof=1``) estimate the component of the factor plus what is left
    over by the average: interaction and draws.
    """
    draw = table.within / table.freedom
    grand = table.means.mean()
    sizes = {name: levels.shape[1] for name, levels in table.factors.items()}
    if len(sizes) == 1:
        (name,) = sizes
        left = float(table.means.var(ddof=1) - draw * table.noise[0])
        return {name: left, "draw": draw}
    square = table.means.reshape(sizes["source"], sizes["method"])
    rows, columns = square.mean(1), square.mean(0)
    freedom = (sizes["source"] - 1) * (sizes["method"] - 1)
    left = float(np.square(square - rows[:, None] - columns + grand).sum()) / freedom
    return {
        "source": float(rows.var(ddof=1)) - left / sizes["method"],
        "method": float(columns.var(ddof=1)) - left / sizes["source"],
        "interaction": left - draw * float(table.noise[0]),
        "draw": draw,
    }


def _reml(table: _Table, near: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return the estimates that maximize the restricted likelihood.

    It falls apart into that of the sums of squares within the cells and that of the cell means,
    whose covariance is ``sum(variance Z Z') + draw * noise``. In units of the last component (the
    draws, or the interaction where no draw varies) that unit has a closed form; the roots of the
    other ratios are searched, so that none is negative: from several starts, or from one that is
    near.
    """
    factors = table.factors
    names = list(factors)
    if table.within > 0:
        unit, base, freedom = "draw", np.diag(table.noise), table.freedom
    else:
        unit = names.pop()
        base, freedom = factors[unit] @ factors[unit].T, 0
    squares = [factors[name] @ factors[name].T for name in names]
    ones = np.ones(len(table.means))
    centered = table.means - table.means.mean()
    total = freedom + len(ones) - 1

    def fit(roots: Array) -> tuple[float, Array, float]:
        """Return -2 log likelihood, its gradient and the unit."""
        inverse = np.linalg.inv(base + sum(r**2 * s for r, s in zip(roots, squares, strict=True)))
        row = inverse @ ones
        project = inverse - np.outer(row, row) / row.sum()
        residual = project @ centered
        left = table.within + float(centered @ residual)
        value = total * np.log(left) - np.linalg.slogdet(inverse)[1] + np.log(row.sum())
        slopes = [
            2 * r * ((project * s).sum() - total * (residual @ s @ residual) / left)
            for r, s in zip(roots, squares, strict=True)
        ]
        return float(value), np.array(slopes), left / total

    starts = [np.full(len(names), start) for start in _STARTS]
    if near is not None and near[unit] > 0:  # at 0 the slope of a root is 0, whatever the data say
        starts = [np.sqrt([max(0.05, near[name] / near[unit]) for name in names])]
    best = np.zeros(0)
    if names:
        found = [
            optimize.minimize(lambda roots: fit(roots)[:2], start, jac=True, method="BFGS")
            for start in starts
        ]
        best = min(found, key=lambda result: float(result.fun)).x
    size = fit(best)[2]
    variances = {name: float(size * root**2) for name, root in zip(names, best, strict=True)}
    variances |= {unit: size} if unit == "draw" else {unit: size, "draw": 0.0}
    least = 1e-9 * max(variances.values())  # a root that is searched never is 0
    return {
        name: variances[name] if variances[name] > least else 0.0 for name in (*factors, "draw")
    }
