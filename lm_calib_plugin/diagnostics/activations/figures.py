"""The plots of the report: magnitudes and rounding by layer, overlaps of sets, histograms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lm_calib_plugin.diagnostics.activations.findings import TENSOR, ratio, worst
from lm_calib_plugin.diagnostics.activations.histogram import densities
from lm_calib_plugin.diagnostics.activations.result import ALL, REST, Result
from lm_calib_plugin.diagnostics.activations.rounding import (
    FORMATS,
    MEDIAN,
    PLAIN,
    ROTATED,
    SMOOTHED,
)
from lm_calib_plugin.diagnostics.document import Figure
from lm_calib_plugin.drawing import canvas
from lm_calib_plugin.drawing.svg import Palette

_WORST = 3
# One value a block; None: nothing to draw.
Values = list[float | None]


def magnitude(result: Result) -> Figure:
    """Draw the largest value, p99.9 and the median by block."""
    styles = [
        ("amax", ALL, "-", 1.6, max),
        ("amax", REST, "--", 1.2, max),
        ("p99.9", ALL, "-.", 1.0, max),
        ("median", ALL, ":", 1.0, max),
    ]
    lines = []
    for number, one in enumerate(result.sets.values()):
        for key, part, style, width, join in styles:
            values = _by_block(
                result, lambda name, o=one, p=part, k=key: o.inputs[name][p].get(k), join
            )
            label = one.name if (key, part) == ("amax", ALL) else None
            lines.append((values, number, style, width, label))
    words = [_words(one.name, lines[4 * i][0]) for i, one in enumerate(result.sets.values())]
    return Figure(
        "Activation magnitude by layer",
        "One color a set; of all inputs of a block the largest. Solid: largest |x|; dashed: "
        "without first tokens; dash-dotted: p99.9; dotted: median.",
        " ".join(["Largest |x| by block.", *words]),
        _painter("Activation magnitude by layer", "|x| of the inputs of a block", lines, log=True),
    )


def rounding(result: Result) -> Figure:
    """Draw the ratio of int8 with one scale a tensor, by block."""
    lines = []
    for number, one in enumerate(result.sets.values()):
        for part, how, style, label in (
            (ALL, PLAIN, "-", one.name),
            (REST, PLAIN, "--", None),
            (ALL, PLAIN + MEDIAN, ":", None),
        ):
            values = _by_block(
                result, lambda name, o=one, p=part, h=how: ratio(o, name, TENSOR, p, h), min
            )
            lines.append((values, number, style, 1.4, label))
    words = [_words(one.name, lines[3 * i][0]) for i, one in enumerate(result.sets.values())]
    title = "Rounding to int8 by layer"
    return Figure(
        title,
        "One scale a tensor; the worst input of each block, in dB: higher is better. Dashed: "
        "without first tokens; dotted: of the median token.",
        " ".join(["Ratio of int8 per tensor by block, in dB.", *words]),
        _painter(title, "signal over rounding noise [dB], higher is better", lines),
    )


def formats(result: Result) -> Figure:
    """Draw the ratios of all formats of the first set, by block."""
    one = next(iter(result.sets.values()))
    wanted = [(name, PLAIN + MEDIAN, name, "-") for name in FORMATS]
    wanted += [(TENSOR, SMOOTHED + MEDIAN, f"{TENSOR}, SmoothQuant", "--")]
    wanted += [(TENSOR, ROTATED + MEDIAN, f"{TENSOR}, rotated", "-.")]
    lines = []
    for number, (kind, how, label, style) in enumerate(wanted):
        values = _by_block(result, lambda name, k=kind, h=how: ratio(one, name, k, ALL, h), min)
        if any(value is not None for value in values):
            lines.append((values, number, style, 1.4, label))
    title = "Formats by layer"
    return Figure(
        title,
        f"Set {one.name}; the median token at the worst input of each block, in dB: higher is "
        "better.",
        " ".join(_words(str(label), values) for values, *_, label in lines),
        _painter(title, f"{one.name}, signal over rounding noise [dB]", lines),
    )


def overlap(result: Result) -> Figure:
    """Draw the overlap of the outlier channels of the first set with those of the others."""
    first = next(iter(result.sets))
    lines = []
    for number, names in enumerate(p for p in result.pairs if p[0] == first):
        for part, style in ((ALL, "-"), (REST, "--")):
            values = _by_block(
                result,
                lambda name, n=names, p=part: (
                    result.pairs[n].get(name, {}).get(p, {}).get("jaccard")
                ),
                _mean,
            )
            label = f"with {names[1]}" if part == ALL else None
            lines.append((values, number, style, 1.4, label))
    words = [_words(str(label), values) for values, *_, label in lines if label]
    own = result.sets[first].halves
    lines.append(
        (
            _by_block(result, lambda name: own[name]["jaccard"], _mean),
            None,
            ":",
            1.2,
            f"halves of {first}",
        )
    )
    title = "Overlap of outlier channels by layer"
    return Figure(
        title,
        "Jaccard index of the 1 % of channels with the largest inputs, mean over the inputs of a "
        "block: 1 is the same. Dashed: without first tokens; dotted: even and odd sequences of one "
        "set, to judge by.",
        " ".join(["Overlap by block.", *words]),
        _painter(title, "Jaccard index of the top 1 % of channels", lines, low=0.0),
    )


def histograms(result: Result) -> list[Figure]:
    """Draw |x| of the inputs that round worst, by doubling."""
    lowest: dict[str, float] = {}
    for one in result.sets.values():
        for value, name in worst(one):
            lowest[name] = min(value, lowest.get(name, math.inf))
    order = sorted(lowest, key=lambda name: (lowest[name], name))
    return [_histogram(result, name) for name in order[:_WORST]]


def _histogram(result: Result, name: str) -> Figure:
    sets = list(result.sets.values())

    def paint(colors: Palette) -> Any:
        figure, axis = canvas.new_figure(
            2.8 + 0.2 * len(sets),
            f"|x| of {name}",
            "share of the values, per doubling of |x|",
            colors,
        )
        xs: list[float] = []
        ys: list[float] = []
        for number, one in enumerate(sets):
            for part, style in ((ALL, "-"), (REST, "--")):
                x, y = densities(one.densities[name][part])
                if not len(x):
                    continue
                label = canvas.label(one.name) if part == ALL else None
                axis.plot(x, y, style, color=colors.series(number), linewidth=1.3, label=label)
                xs += x.tolist()
                ys += y.tolist()
        if xs:
            canvas.logarithmic(axis, "x", xs)
            canvas.logarithmic(axis, "y", ys)
        return _finished(figure, axis, colors)

    words = [f"{one.name}: up to {one.inputs[name][ALL].get('amax', 0):.4g}." for one in sets]
    return Figure(
        f"Histogram of {name}",
        "Share of the values by size, both axes logarithmic. Dashed: without first tokens. Zeros "
        "are not drawn.",
        " ".join(words),
        paint,
    )


def _by_block(
    result: Result, value: Callable[[str], float | None], join: Callable[[list[float]], float]
) -> Values:
    found: dict[int, list[float]] = {}
    for one in result.inputs:
        own = value(one.name)
        if own is not None and math.isfinite(own):
            found.setdefault(one.block, []).append(own)
    depth = 1 + max(one.block for one in result.inputs)
    return [join(found[index]) if index in found else None for index in range(depth)]


def _painter(
    title: str,
    subtitle: str,
    lines: Sequence[tuple[Values, int | None, str, float, str | None]],
    log: bool = False,
    low: float | None = None,
) -> Callable[[Palette], Any]:
    def paint(colors: Palette) -> Any:
        named = [label for *_, label in lines if label]
        rows = sum(canvas.wrapped(label).count("\n") + 1 for label in named)
        figure, axis = canvas.new_figure(2.8 + 0.2 * -(-rows // 2), title, subtitle, colors)
        drawn: list[float] = []
        for values, number, style, width, label in lines:
            y = [math.nan if value is None else value for value in values]
            color = colors["muted"] if number is None else colors.series(number)
            text = canvas.label(label) if label else None
            marker = "o" if len(y) == 1 else None
            axis.plot(
                range(len(y)), y, style, color=color, linewidth=width, marker=marker, label=text
            )
            drawn += [value for value in values if value is not None and value > 0]
        if log and drawn:
            canvas.logarithmic(axis, "y", drawn)
        if low is not None:
            axis.set_ylim(low, 1.05)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("block")
        return _finished(figure, axis, colors)

    return paint


def _finished(figure: Any, axis: Any, colors: Palette) -> Any:
    axis.grid(axis="y", color=colors["grid"], linewidth=0.7)
    axis.set_axisbelow(True)
    canvas.legend(figure, axis, colors)
    return figure


def _words(name: str, values: Values) -> str:
    known = [(value, index) for index, value in enumerate(values) if value is not None]
    if not known:
        return f"{name}: nothing."
    (low, where), (high, there) = min(known), max(known)
    return f"{name}: {low:.4g} (block {where}) to {high:.4g} (block {there})."


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
