"""The perturbation ruler: how a loss grows with noise, and what error of a recipe is like which.

After arXiv 2403.06408: what harms is the size of a perturbation more than its distribution. So
noise of stated relative size on weights, or on inputs of layers, is a ruler that needs no recipe,
and the error that a recipe really makes can be laid on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from lm_calib_plugin import engine
from lm_calib_plugin.comparison.numbers import Array, Interval
from lm_calib_plugin.diagnostics.pair import share_equal, twin
from lm_calib_plugin.diagnostics.sensitivity.curves import (
    Point,
    Slope,
    of_seed,
    size_at,
    slope_of,
)
from lm_calib_plugin.diagnostics.sensitivity.judge import Judge, plain
from lm_calib_plugin.diagnostics.sensitivity.options import ALIGNED, GAUSSIAN, INPUTS, WEIGHTS
from lm_calib_plugin.diagnostics.sensitivity.parts import chosen_layers
from lm_calib_plugin.diagnostics.sensitivity.perturb import (
    generator_of,
    mirrored,
    noisy_inputs,
    weight_noise,
)
from lm_calib_plugin.diagnostics.sensitivity.variants import Compressed, Weights, target_layers
from lm_calib_plugin.errors import NumericalError, UserError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.recipe import Recipe


@dataclass(frozen=True)
class Curve:
    """Loss against size, for one kind of noise.

    ``at_rise`` is the size at which the loss has risen by the nats that were asked for; None:
    outside of the sizes tried. ``like_recipe`` are the sizes that cost as much as the recipe, and
    as the ends of its interval; None where its loss is not told from 0. ``like_recipe_seeds`` is
    the first of these by each seed alone.
    """

    kind: str
    points: list[Point]
    slope: Slope | None
    at_rise: float | None
    like_recipe: tuple[float | None, float | None, float | None] | None = None
    like_recipe_seeds: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Actual:
    """The error of a recipe: ``size`` over all layers in question, that of each, and its loss.

    Sizes are Frobenius norms of ``compressed - dense`` over those of the dense weights.
    """

    size: float
    layers: dict[str, float]
    scores: Array
    increase: Interval


@dataclass(frozen=True)
class NoiseResult:
    """Curves of all kinds, and the error of the recipe where there is one."""

    judge: Judge
    dense: Array
    place: str
    layers: list[str]
    rise: float
    curves: list[Curve]
    actual: Actual | None
    no_actual: str | None

    def plain(self) -> dict[str, Any]:
        """Return plain values."""
        actual = self.actual
        return {
            "place": self.place,
            "layers": self.layers,
            "rise": self.rise,
            "dense": self.dense.tolist(),
            "curves": [
                {
                    "kind": curve.kind,
                    "points": [point.plain() for point in curve.points],
                    "slope": None if curve.slope is None else vars(curve.slope),
                    "size_at_rise": curve.at_rise,
                    "size_like_recipe": curve.like_recipe,
                    "size_like_recipe_seeds": list(curve.like_recipe_seeds),
                }
                for curve in self.curves
            ],
            "recipe": None
            if actual is None
            else {
                "size": actual.size,
                "layers": actual.layers,
                "scores": actual.scores.tolist(),
                "increase": plain(actual.increase),
            },
            "no_recipe": self.no_actual,
        }


def probe_noise(
    model: Any,
    judge: Judge,
    compressed: Compressed | None = None,
    *,
    kinds: Sequence[str] | None = None,
    place: str = WEIGHTS,
    layers: Sequence[str] | None = None,
    seeds: int = 2,
    sizes: Sequence[float] = (),
    rise: float = 0.1,
    progress: bool = True,
) -> NoiseResult:
    """Score a model with noise of rising size; it is left as found.

    Parameters
    ----------
    model
        The dense model.
    compressed
        The recipe, done to a twin; its error becomes a point beside the curves.
    kinds, place, layers, seeds, sizes, rise
        As for :class:`~lm_calib_plugin.diagnostics.sensitivity.options.SensitivityOptions`.

    Raises
    ------
    UserError
        For ``aligned`` noise where no error of weights is known, and layers that there are not.
    """
    weights = None if compressed is None else compressed.weights
    if weights is None:
        weights = _dense_weights(model, None if compressed is None else compressed.recipe)
    has_error = compressed is not None and compressed.weights is not None
    missing = None if compressed is None or has_error else compressed.how
    kinds = _kinds(kinds, place, has_error, missing)
    chosen = chosen_layers(layers, weights.layers, weights.blocks)
    bar = tqdm(
        total=1 + has_error + len(kinds) * seeds * len(sizes),
        desc="noise, models",
        disable=not progress,
    )
    with left_as_found(model), bar:
        dense = judge.score(model)
        bar.update()
        bench = _Bench(weights, judge, dense, chosen, place, bar)
        actual = bench.actual() if has_error else None
        curves = [bench.curve(kind, sizes, seeds, rise, actual) for kind in kinds]
    if place == INPUTS and missing is None and actual is not None:
        missing = "its error is one of weights, the noise one of inputs"
    names = [layer.name for layer in chosen]
    return NoiseResult(judge, dense, place, names, rise, curves, actual, missing)


class _Bench:
    """Disturbs one model again and again; its loss is that above the dense model's."""

    def __init__(
        self,
        weights: Weights,
        judge: Judge,
        dense: Array,
        layers: Sequence[engine.TargetLayer],
        place: str,
        bar: Any,
    ) -> None:
        self.weights, self.judge, self.dense = weights, judge, dense
        self.layers, self.place, self.bar = layers, place, bar

    def curve(
        self, kind: str, sizes: Sequence[float], seeds: int, rise: float, actual: Actual | None
    ) -> Curve:
        points = [self._point(kind, size, seeds) for size in sizes]
        like: tuple[float | None, float | None, float | None] | None = None
        single: tuple[float | None, ...] = ()
        if actual is not None and self.place == WEIGHTS and actual.increase.low > 0:
            gap = actual.increase
            sizes_of = [size_at(points, loss) for loss in (gap.value, gap.low, gap.high)]
            like = (sizes_of[0], sizes_of[1], sizes_of[2])
            single = tuple(size_at(of_seed(points, i), gap.value) for i in range(seeds))
        return Curve(kind, points, slope_of(points), size_at(points, rise), like, single)

    def actual(self) -> Actual:
        """Return the error of the recipe on the layers in question, all others dense."""
        scores = self.judge.score(self.weights.use(layer.name for layer in self.layers))
        self.bar.update()
        own, moved, total = {}, 0.0, 0.0
        for layer in self.layers:
            dense, compressed = self.weights.weights_of(layer)
            error = float((compressed - dense).double().square().sum())
            square = float(dense.double().square().sum())
            own[layer.name] = math.sqrt(error / square) if square else 0.0
            moved, total = moved + error, total + square
        size = math.sqrt(moved / total) if total else 0.0
        return Actual(size, own, scores, self.judge.increase(scores, self.dense))

    def _point(self, kind: str, size: float, seeds: int) -> Point:
        found, stored = [], size
        for seed in range(seeds):
            try:
                if self.place == INPUTS:
                    found.append(self._with_inputs(kind, size, seed))
                else:
                    scores, stored = self._with_weights(kind, size, seed)
                    found.append(scores)
            except NumericalError:
                # A model that is broken this far has no loss; the sizes below have one.
                self.bar.update(seeds - seed)
                return Point(size, stored, math.inf, math.inf, math.inf, ())
            self.bar.update()
        interval = self.judge.increase(np.mean(found, axis=0), self.dense)
        each = tuple(self.judge.mean(scores - self.dense) for scores in found)
        return Point(size, stored, interval.value, interval.low, interval.high, each)

    def _with_inputs(self, kind: str, size: float, seed: int) -> Array:
        model = self.weights.put({})
        with noisy_inputs(self.layers, size, kind, seed):
            return self.judge.score(model)

    def _with_weights(self, kind: str, size: float, seed: int) -> tuple[Array, float]:
        """Return scores, and the size of the noise as it is in the weights that were stored."""
        values = {}
        moved = total = 0.0
        for layer in self.layers:
            dense, compressed = self.weights.weights_of(layer)
            error = compressed - dense if kind == ALIGNED else None
            draw, sign = mirrored(kind, seed)
            drawn = generator_of("weights", kind, draw, layer.name)
            value = dense + sign * weight_noise(dense, size, kind, drawn, error)
            values[layer.name] = value.to(layer.parameter.dtype)
            moved += float((values[layer.name].double() - dense.double()).square().sum())
            total += float(dense.double().square().sum())
        scores = self.judge.score(self.weights.put(values))
        return scores, math.sqrt(moved / total) if total else 0.0


def _dense_weights(model: Any, recipe: Recipe | None) -> Weights:
    """Return weights to disturb without those of a run; a tied head that is meant gets its own."""
    work = twin(model)
    engine.untied(work, target_layers(work, recipe))
    share_equal(model, work)
    return Weights(model, work, recipe)


def _kinds(
    kinds: Sequence[str] | None, place: str, has_error: bool, missing: str | None
) -> tuple[str, ...]:
    """Return the kinds of noise, the default filled in."""
    if kinds is None:
        return (GAUSSIAN, ALIGNED) if has_error and place == WEIGHTS else (GAUSSIAN,)
    if ALIGNED in kinds and not has_error:
        raise UserError(
            "noise",
            f"`{ALIGNED}` needs the rounding error of weights",
            missing or "a recipe that changes weights and nothing else",
            f"--noise {GAUSSIAN}",
        )
    return tuple(kinds)


def spread(point: Point) -> float | None:
    """Return the standard deviation of the seeds of a point; None for fewer than two."""
    return float(np.std(point.each, ddof=1)) if len(point.each) > 1 else None
