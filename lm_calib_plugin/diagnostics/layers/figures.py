"""Errors of layers in pictures: by depth, by kind, calibration against other data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_calib_plugin.diagnostics.document import Figure
from lm_calib_plugin.diagnostics.layers.depths import FIRST_TOKENS, Propagation
from lm_calib_plugin.diagnostics.layers.evidence import CALIBRATION, HELDOUT, TEXT, Layer
from lm_calib_plugin.diagnostics.layers.findings import Group
from lm_calib_plugin.diagnostics.layers.reasons import OVER_FIT
from lm_calib_plugin.drawing import canvas
from lm_calib_plugin.drawing.svg import Palette

NAMES = {CALIBRATION: "calibration", HELDOUT: "held out", TEXT: "text"}
_UNIT = "relative squared error"


def by_depth(found: Propagation) -> Figure | None:
    """Draw errors of hidden states by depth; None where there is nothing to draw."""
    curves = {
        "free": found.curve("free"),
        "teacher-forced": found.curve("local"),
        "sum of teacher-forced": found.added(),
    }
    hidden = found.first_tokens()
    if hidden is not None and hidden[1] >= FIRST_TOKENS:
        curves["free, without first tokens"] = found.curve("free", rest=True)
    shown = {name: _points(values) for name, values in curves.items()}
    if not found.aligned or not all(shown.values()) or len(found.depths) < 2:
        return None

    def paint(colors: Palette) -> Any:
        from matplotlib.ticker import MaxNLocator

        figure, axis = canvas.new_figure(
            3.0,
            "Error by depth",
            "hidden states behind each block, compressed against dense",
            colors,
        )
        for number, (name, points) in enumerate(shown.items()):
            x, y = zip(*points, strict=True)
            axis.plot(
                x, y, color=colors.series(number), linestyle=("-", "-", ":", "--")[number],
                marker="osD^"[number], markersize=3.5, linewidth=1.5, label=name,
            )  # fmt: skip
        canvas.logarithmic(axis, "y", [y for points in shown.values() for _, y in points])
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        _named(axis, "block", _UNIT, colors)
        canvas.legend(figure, axis, colors)
        return figure

    ends = "; ".join(f"{name}: {points[-1][1]:.3g}" for name, points in shown.items())
    return Figure(
        "Error by depth",
        "Teacher-forced: each block receives the dense hidden states. Free: what the compressed "
        "blocks before it give. Where free lies above the dotted sum, later blocks make earlier "
        "errors larger.",
        f"Relative squared error of hidden states by block. At the last block {ends}.",
        paint,
    )


def by_kind(found: Sequence[Group], basis: str) -> Figure | None:
    """Draw mean errors by kind of layer; None where there is nothing to draw."""
    known = [(str(group.name), group.means[basis]) for group in found]
    shown = [(name, value) for name, value in known if value is not None and value > 0]
    if not shown:
        return None
    shown.sort(key=lambda one: one[1])

    def paint(colors: Palette) -> Any:
        figure, axis = canvas.new_figure(
            1.1 + 0.27 * len(shown), "Error by kind of layer", f"mean, {NAMES[basis]}", colors
        )
        places = range(len(shown))
        axis.barh(places, [value for _, value in shown], color=colors.series(0), height=0.6)
        axis.set_yticks(places, [canvas.wrapped(name) for name, _ in shown])
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel(_UNIT, color=colors["ink"])
        axis.grid(axis="x", color=colors["grid"], linewidth=0.7)
        axis.set_axisbelow(True)
        return figure

    words = ", ".join(f"{name} {value:.3g}" for name, value in reversed(shown))
    return Figure(
        "Error by kind of layer",
        "Mean relative squared error of the outputs of all layers of a kind.",
        f"Mean error by kind of layer: {words}.",
        paint,
    )


def against_calibration(layers: Sequence[Layer]) -> Figure | None:
    """Draw errors on other data against those on calibration; None where there is nothing."""
    series: dict[str, list[tuple[float, float]]] = {}
    for layer in layers:
        for name, ratio in layer.over_fit().items():
            own = layer.row.error_heldout if name == HELDOUT else layer.text and layer.text.error
            if own and ratio > 0:
                series.setdefault(name, []).append((own / ratio, own))
    if not series:
        return None

    def paint(colors: Palette) -> Any:
        figure, axis = canvas.new_figure(
            3.4,
            "Calibration against other data",
            "one point a layer, relative squared error",
            colors,
        )
        for number, (name, points) in enumerate(series.items()):
            x, y = zip(*points, strict=True)
            axis.plot(
                x, y, "os"[number], color=colors.series(number), markersize=3.5, alpha=0.75,
                label=NAMES[name],
            )  # fmt: skip
        every = [v for points in series.values() for point in points for v in point]
        ends = [min(every), max(every)]
        axis.plot(ends, ends, color=colors["muted"], linewidth=1, label="equal")
        twice = [OVER_FIT * end for end in ends]
        axis.plot(
            ends, twice, color=colors["ink"], linewidth=1, linestyle=":", label="twice: over-fitted"
        )
        canvas.logarithmic(axis, "x", every)
        canvas.logarithmic(axis, "y", [*every, *twice])
        _named(axis, "on calibration data", "on other data", colors)
        canvas.legend(figure, axis, colors)
        return figure

    count = sum(y >= OVER_FIT * x for points in series.values() for x, y in points)
    return Figure(
        "Calibration against other data",
        "Layers above the dotted line err at least twice as much on other data.",
        f"Errors of layers on other data against those on calibration; {count} points lie at "
        "twice or more.",
        paint,
    )


def _points(values: Sequence[float]) -> list[tuple[int, float]]:
    """Return what a logarithmic axis can show."""
    return [(place, value) for place, value in enumerate(values) if value > 0]


def _named(axis: Any, x: str, y: str, colors: Palette) -> None:
    axis.set_xlabel(x, color=colors["ink"])
    axis.set_ylabel(y, color=colors["ink"])
    axis.grid(color=colors["grid"], linewidth=0.7)
    axis.set_axisbelow(True)
