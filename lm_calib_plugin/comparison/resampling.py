"""Draws and items taken again at random, once for all comparisons that share them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lm_calib_plugin.comparison.numbers import (
    CONFIDENCE,
    RESAMPLES,
    Array,
    Interval,
    blocks,
    item_weights,
    percentile_interval,
)

_CHUNK = 1 << 22  # numbers drawn at a time: 32 MiB
_ROUNDING = 1e-12  # of two scores, relative: what is nearer is equal


class Resampling:
    """Resamples of draws and items, the same ones for every arm of a column.

    A resampled score is linear in the scores of the items, so that it is computed once for each arm
    (:meth:`scores`) and any two of them are compared by their difference (:meth:`interval`). The
    resamples are those of :func:`~lm_calib_plugin.comparison.two_level_bootstrap`, whose results
    these are but for rounding.

    Parameters
    ----------
    draws, items
        How many there are.
    weights, strata
        ``[items]``, as for :func:`~lm_calib_plugin.comparison.two_level_bootstrap`.
    """

    def __init__(
        self,
        draws: int,
        items: int,
        resamples: int = RESAMPLES,
        seed: int = 0,
        *,
        weights: ArrayLike | None = None,
        strata: ArrayLike | None = None,
    ) -> None:
        found = blocks(strata, items)
        self.draws, self.resamples = draws, resamples
        self.weights = None if weights is None else item_weights(weights, items)
        self._sizes = (items,) if len(found) == 1 else tuple(len(b) for b in found)
        self._order: NDArray[Any] | slice = slice(None)
        if len(found) > 1:
            order = np.concatenate(found)
            if (np.diff(order) < 0).any():
                self._order = order
        self._heavy = None if self.weights is None else self.weights[self._order]
        step = max(1, _CHUNK // max(draws, items))
        self._taken = (draws, self._sizes, resamples, seed, step)

    @cached_property
    def _rows(self) -> Array:
        """Shares of draws, ``[resamples, draws]``, kept when the items are long forgotten."""
        return np.concatenate([draws for draws, _ in _taken(*self._taken)]) / self.draws

    def parts(self) -> Iterator[tuple[Array, Array]]:
        """Yield shares of draws and weights of items, ``[resamples, draws or items]``, in parts."""
        for taken_draws, taken_items in _taken(*self._taken):
            rows = taken_draws.astype(np.float64) / self.draws
            yield rows, self._columns(taken_items)

    def _columns(self, taken: NDArray[Any]) -> Array:
        """Return the weights of items (in the order of strata); each row sums to 1."""
        columns = taken.astype(np.float64)
        if len(self._sizes) == 1:
            columns /= self._sizes[0]
            if self._heavy is not None:
                columns = columns * self._heavy
                columns /= columns.sum(1, keepdims=True)
            return columns
        starts = np.cumsum((0, *self._sizes[:-1]))
        heavy = np.ones(columns.shape[1]) if self._heavy is None else self._heavy
        columns *= heavy
        # What a stratum weighs in sum is fixed, whichever of its items are taken.
        fixed = np.add.reduceat(heavy, starts) / heavy.sum()
        columns *= np.repeat(fixed / np.add.reduceat(columns, starts, axis=1), self._sizes, axis=1)
        return columns

    def ordered(self, scores: Array) -> Array:
        """Return ``[draws, items]`` in the order of strata."""
        return scores[:, self._order]

    def scores(self, tables: Sequence[Array]) -> list[Array]:
        """Return the score of each draw over resampled items, ``[resamples, draws]``.

        Parameters
        ----------
        tables
            ``[draws, items]``, those of many arms at once. One row may stand for all draws.
        """
        ordered = [self.ordered(table) for table in tables]
        found = [np.empty((self.resamples, len(table))) for table in tables]
        start = 0
        for _, columns in self.parts():
            for table, scores in zip(ordered, found, strict=True):
                scores[start : start + len(columns)] = columns @ table.T
            start += len(columns)
        return found

    def interval(
        self,
        value: float,
        a: Array,
        b: Array | None = None,
        confidence: float = CONFIDENCE,
        expanded: bool = True,
    ) -> Interval:
        """Return the interval of a, or of ``a - b``, from what :meth:`scores` returned."""
        each = a
        if b is not None:
            each = a - b
            each = np.where(np.abs(each) <= _ROUNDING * np.maximum(abs(a), abs(b)), 0.0, each)
        rows = expand(self._rows, self.draws, confidence if expanded else None)
        return percentile_interval(value, (rows * each).sum(1), confidence)


def expand(rows: Array, draws: int, confidence: float | None) -> Array:
    """Return shares of draws with their deviations scaled for few draws (None: as they are)."""
    factor = 1.0 if confidence is None else expansion(draws, confidence)
    return rows if factor == 1 else 1 / draws + factor * (rows - 1 / draws)


def expansion(draws: int, confidence: float = CONFIDENCE) -> float:
    """Return by how much deviations of resampled draws are scaled for few draws; 1 for one draw."""
    if draws < 2:
        return 1.0
    tail = (1 + confidence) / 2
    return float(
        math.sqrt(draws / (draws - 1)) * stats.t.ppf(tail, draws - 1) / stats.norm.ppf(tail)
    )


@lru_cache(maxsize=4)
def _taken(
    draws: int, sizes: tuple[int, ...], resamples: int, seed: int, step: int
) -> tuple[tuple[NDArray[Any], ...], ...]:
    """Return how often each draw and each item is taken, ``[resamples, draws or items]``, in parts.

    Items are taken stratum by stratum. Many comparisons of one column ask for the same, and drawing
    them is most of their time. As small integers, those of 14,000 items and 2,000 resamples are
    28 MB.
    """
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        taken = [rng.multinomial(n, np.full(n, 1 / n), count) for n in (draws, *sizes)]
        items = taken[1] if len(sizes) == 1 else np.concatenate(taken[1:], 1)
        found.append(tuple(n.astype(np.min_scalar_type(n.max())) for n in (taken[0], items)))
    return tuple(found)
