"""Figures of sensitivity. Callers choose the colors and write the files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_calib_plugin.diagnostics.sensitivity.depth import Ranking
from lm_calib_plugin.diagnostics.sensitivity.groups import GroupRow
from lm_calib_plugin.diagnostics.sensitivity.noise import NoiseResult
from lm_calib_plugin.diagnostics.sensitivity.options import WEIGHTS
from lm_calib_plugin.drawing import canvas
from lm_calib_plugin.drawing.svg import Palette

_MARKERS = "osD^vPX"
_ROW = 0.3


def shares(rows: Sequence[GroupRow], title: str, colors: Palette) -> Any:
    """Draw how much of the loss each part carries: left dense, and compressed alone."""
    figure, axis = canvas.new_figure(1.3 + _ROW * len(rows), title, "share of the loss, %", colors)
    looks = (("goes when it stays dense", 0, -0.13), ("made by it alone", 1, 0.13))
    for name, number, shift in looks:
        found = [(row.recovery, row.damage)[number] for row in rows]
        values = [100 * (share.value or 0.0) for share in found]
        ends = [
            (value if s.low is None else 100 * s.low, value if s.high is None else 100 * s.high)
            for s, value in zip(found, values, strict=True)
        ]
        bars = [
            [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
        ]
        places = [y + shift for y in range(len(rows))]
        axis.errorbar(
            values, places, xerr=bars, fmt=_MARKERS[number], color=colors.series(number),
            markersize=4.5, elinewidth=1, capsize=2, label=canvas.label(name),
        )  # fmt: skip
    axis.axvline(0, color=colors["ink"], linewidth=1, linestyle=":")
    axis.set_yticks(range(len(rows)), [canvas.wrapped(row.group.name) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=colors["grid"], linewidth=0.7)
    axis.set_axisbelow(True)
    canvas.legend(figure, axis, colors)
    return figure


def curves(result: NoiseResult, colors: Palette) -> Any:
    """Draw loss against size of noise, with the error of the recipe."""
    figure, axis = canvas.new_figure(3.4, "Noise of stated size", "NLL rises, nats", colors)
    sizes, losses = [], []
    for number, curve in enumerate(result.curves):
        points = [p for p in curve.points if p.finite and p.value > 0]
        if not points:
            continue
        sizes += [p.stored for p in points]
        losses += [p.value for p in points]
        axis.errorbar(
            [p.stored for p in points],
            [p.value for p in points],
            yerr=[
                [min(p.value - p.low, 0.999 * p.value) for p in points],
                [p.high - p.value for p in points],
            ],
            color=colors.series(number),
            marker=_MARKERS[number],
            markersize=4.5,
            linewidth=1.5,
            elinewidth=1,
            capsize=2,
            label=canvas.label(f"{curve.kind} noise"),
        )
    actual = result.actual
    if actual is not None and result.place == WEIGHTS and actual.increase.value > 0:
        sizes.append(actual.size)
        losses.append(actual.increase.value)
        axis.plot(
            [actual.size], [actual.increase.value], "*", color=colors["ink"], markersize=11,
            linestyle="none", zorder=5, label=canvas.label("the recipe"),
        )  # fmt: skip
    if sizes:
        axis.axhline(result.rise, color=colors["muted"], linewidth=1, linestyle=":")
        canvas.logarithmic(axis, "x", sizes)
        canvas.logarithmic(axis, "y", losses)
        canvas.legend(figure, axis, colors)
    axis.set_xlabel(f"relative size of the noise on {result.place}")
    axis.grid(color=colors["grid"], linewidth=0.7)
    axis.set_axisbelow(True)
    return figure


def importances(
    rankings: Sequence[Ranking], names: Sequence[str], unit: str, colors: Palette
) -> Any:
    """Draw the importance of every part, a line a ranking, as a share of its largest value."""
    from matplotlib.ticker import MaxNLocator

    height = 2.9 + 0.2 * -(-len(rankings) // 2)
    figure, axis = canvas.new_figure(height, f"Importance of {unit}s", "share of largest", colors)
    for number, (ranking, name) in enumerate(zip(rankings, names, strict=True)):
        top = max(map(abs, ranking.values)) or 1.0
        axis.plot(
            range(len(ranking.values)),
            [value / top for value in ranking.values],
            color=colors.series(number),
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=3.5,
            linewidth=1.3,
            label=canvas.label(name),
        )
    axis.axhline(0, color=colors["ink"], linewidth=1, linestyle=":")
    axis.set_xlabel(f"number of the {unit}")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.grid(color=colors["grid"], linewidth=0.7)
    axis.set_axisbelow(True)
    canvas.legend(figure, axis, colors)
    return figure
