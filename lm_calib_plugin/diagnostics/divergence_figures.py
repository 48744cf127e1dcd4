"""Figures of a comparison of two models on texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_calib_plugin.comparison.numbers import Array
from lm_calib_plugin.drawing import canvas
from lm_calib_plugin.drawing.svg import Palette

LN2 = float(np.log(2.0))
_SMALLEST = 1e-7  # what is closer is rounding
_POINTS = 200


def distribution(values: Mapping[str, Array], colors: Palette) -> Any:
    """Draw the share of tokens with at least that much divergence, a line a text."""
    title, subtitle = "Divergence over tokens", "share of tokens with at least this JS [nats]"
    figure, axis = canvas.new_figure(_height(2.7, values), title, subtitle, colors)
    every = np.concatenate(list(values.values()))
    low = max(_SMALLEST, float(np.quantile(every[every > 0], 0.01)) / 2)
    grid = np.geomspace(low, LN2, _POINTS)
    for number, (text, js) in enumerate(values.items()):
        ordered = np.sort(js)
        share = 1 - np.searchsorted(ordered, grid) / len(ordered)
        axis.plot(grid, share, color=colors.series(number), label=canvas.label(text), linewidth=1.5)
    axis.axvline(LN2, color=colors["muted"], linewidth=1, linestyle="--")
    axis.set_ylim(0, 1)
    canvas.logarithmic(axis, "x", [low, LN2])
    axis.set_xlabel("JS [nats]")
    axis.set_ylabel("share of tokens")
    _finish(figure, axis, colors)
    return figure


def likelihoods(points: Mapping[str, Sequence[tuple[float, float]]], colors: Palette) -> Any:
    """Draw NLL of the dense and the compressed model, a point a sequence, and the diagonal."""
    title, subtitle = "Likelihood of documents", "nats a token, dense and compressed"
    figure, axis = canvas.new_figure(_height(3.4, points), title, subtitle, colors)
    for number, (text, own) in enumerate(points.items()):
        x, y = np.array(own).T
        color = colors.series(number)
        axis.scatter(x, y, s=16, color=color, label=canvas.label(text), linewidths=0)
    every = [value for own in points.values() for pair in own for value in pair]
    ends = [min(every, default=0.0), max(every, default=1.0)]
    axis.plot(ends, ends, color=colors["muted"], linewidth=1, linestyle="--")
    axis.set_xlabel("dense [nats a token]")
    axis.set_ylabel("compressed [nats a token]")
    _finish(figure, axis, colors)
    return figure


def _height(plain: float, names: Mapping[str, Any]) -> float:
    rows = sum(canvas.wrapped(name).count("\n") + 1 for name in names)
    return plain + 0.2 * -(-rows // 2)


def _finish(figure: Any, axis: Any, colors: Palette) -> None:
    axis.grid(color=colors["grid"], linewidth=0.7)
    axis.set_axisbelow(True)
    canvas.legend(figure, axis, colors)
