"""What all figures share: width, heading, legend, names on lines that fit."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from lm_calib_plugin.drawing.svg import Palette
from lm_calib_plugin.drawing.words import one_line

_FEW = 20  # ends closer than this hold too few powers of ten for an axis
WIDTH = 4.5  # inches of 72 units: what a phone shows without making texts smaller


def wrapped(text: str, width: int = 24) -> str:
    """Return a name on lines that fit, without losing any of it."""
    return "\n".join(textwrap.wrap(one_line(text), width)) or " "


def label(name: str) -> str:
    """Return a name for a legend."""
    text = wrapped(name)
    return " " + text if text.startswith("_") else text  # matplotlib hides such names


def legend(figure: Any, axis: Any, colors: Palette) -> None:
    """Put the legend below a figure."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=2, frameon=False,
        labelcolor=colors["ink"], handlelength=1.8, columnspacing=1.2,
    )  # fmt: skip


def logarithmic(axis: Any, which: str, values: Sequence[float]) -> None:
    """Turn the ``x`` or ``y`` of an axis into one of logarithms that shows these values.

    Bars that reach further than ten times beyond the values are cut at the edge, as a hopeless
    interval would leave no room for anything else.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    getattr(axis, f"set_{which}scale")("log")
    before = getattr(axis, f"get_{which}lim")()
    ends = (max(min(before), low / 10), min(max(before), high * 10))
    getattr(axis, f"set_{which}lim")(*ends)
    one = getattr(axis, f"{which}axis")
    few = ends[1] < _FEW * ends[0]
    one.set_major_locator(MaxNLocator(5) if few else LogLocator(numticks=6))
    one.set_minor_locator(NullLocator())
    one.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))


def _power(value: float) -> str:
    if value < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    return f"{value / 10**exponent:.3g}e{exponent}"


def _engine(figure: Any) -> Any:
    return figure.get_layout_engine()


def new_figure(height: float, title: str, subtitle: str, colors: Palette) -> tuple[Any, Any]:
    """Return a figure with title, subtitle and one axis; ``height`` is that without wraps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title, subtitle = wrapped(title, 50), wrapped(subtitle, 60)
    head = 0.2 + 0.17 * (title.count("\n") + subtitle.count("\n") + 2)
    height += head - 0.54
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=colors["paper"])
    FigureCanvasAgg(figure)
    _engine(figure).set(rect=(0.01, 0.01, 0.97, 0.99 - head / height))
    ink, top = colors["ink"], 1 - 0.07 / height
    size: dict[str, Any] = {"ha": "left", "va": "top", "linespacing": 1.25}
    below = top - (0.19 + 0.18 * title.count("\n")) / height
    figure.text(0.02, top, title, fontsize=10.5, fontweight="bold", color=ink, **size)
    figure.text(0.02, below, subtitle, fontsize=9, color=colors["muted"], **size)
    axis = figure.add_subplot()
    axis.set_facecolor("none")
    for part in ("left", "bottom"):
        axis.spines[part].set_color(colors["muted"])
    axis.tick_params(color=colors["muted"], labelcolor=ink)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(ink)
    return figure, axis
