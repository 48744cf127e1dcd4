"""Figures of tables: calibration by task, entry by rank, shares of the variance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm_calib_plugin.drawing import canvas
from lm_calib_plugin.drawing.svg import Palette
from lm_calib_plugin.leaderboard.report import wording
from lm_calib_plugin.leaderboard.tables import Analysis, Heat, Ranking, Shares

_PARTS = 4  # colors of shares: not those of the first calibrations
# From little to much; the steps of lightness are even, so gray is read the same.
_RAMP = ("#f3f6fa", "#d3e0ee", "#a6c3de", "#6f9fca", "#3b78b0", "#1c5488", "#0d335c")


def heat_words(heat: Heat) -> str:
    """Return a heat map for those who can not see it."""
    lines = []
    for name, values in zip(heat.calibrations, heat.values, strict=True):
        cells = zip(heat.tasks, values, strict=True)
        lines.append(f"{name}: {', '.join(f'{t} {_heat(v, heat)}' for t, v in cells)}.")
    return " ".join(lines)


def tasks(analysis: Analysis, heat: Heat, colors: Palette) -> Any:
    """Draw calibration x task; all maps of a quantity share one scale."""
    seen = [
        value
        for other in analysis.heats
        if other.quantity == heat.quantity
        for line in other.values
        for value in line
        if value is not None
    ]
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    title = f"{heat.model} · {heat.level} · {heat.method}"
    kept = heat.quantity == "retention"
    label = "retention [% of dense, above chance]" if kept else f"{heat.quantity} [nats], dense: 0"
    return _matrix(
        (title, f"{label}; rows: calibrated on"), heat.calibrations, heat.tasks, heat.values,
        (low, high), lambda value: _heat(value, heat), "evaluated on", colors,
    )  # fmt: skip


def _heat(value: float | None, heat: Heat) -> str:
    if heat.quantity == "retention":
        return wording.percent(value, 0)
    return wording.number(value, signed=True)


def rank_words(analysis: Analysis, ranking: Ranking) -> str:
    """Return how stable ranks are for those who can not see it."""
    lines = []
    for id, shares in zip(ranking.entries, ranking.ranks, strict=True):
        found = ", ".join(f"{wording.percent(s, 0)} rank {r}" for r, s in enumerate(shares, 1))
        lines.append(f"{wording.name(analysis.entry(id))}: {found}.")
    return " ".join(lines)


def ranks(analysis: Analysis, ranking: Ranking, colors: Palette) -> Any:
    """Draw how often each entry takes each rank, entries best first by their means."""
    entries = [analysis.entry(id) for id in ranking.entries]
    names = [
        e.calibration if e.calibration and e.calibration != ranking.fixed else e.method
        for e in entries
    ]
    tau = "" if ranking.tau is None else f"; expected tau-b {wording.number(ranking.tau)}"
    title = f"{ranking.model} · {ranking.level} · {ranking.fixed}"
    return _matrix(
        (title, f"rank stability by {_title(analysis, ranking.column)}{tau}"), names,
        [str(n + 1) for n in range(len(names))], ranking.ranks, (0.0, 1.0),
        lambda value: wording.percent(value, 0), "rank from one draw", colors,
    )  # fmt: skip


def _matrix(
    titles: tuple[str, str],
    names: Sequence[str],
    heads: Sequence[str],
    values: Sequence[Sequence[float | None]],
    scale: tuple[float, float],
    text: Callable[[float | None], str],
    label: str,
    colors: Palette,
) -> Any:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    ramp = LinearSegmentedColormap.from_list("ramp", _RAMP)
    rows = [canvas.wrapped(name) for name in names]
    lines = max((name.count("\n") + 1 for name in rows), default=1)
    height = max(0.34, 0.17 * lines) * len(rows)
    heads = [canvas.wrapped(head, max(5, 40 // max(1, len(heads)))) for head in heads]
    figure, axis = canvas.new_figure(1.25 + height, *titles, colors)
    span = scale[1] - scale[0] or 1.0
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            place = 0.0 if value is None else (value - scale[0]) / span
            face = "none" if value is None else ramp(place)
            box = Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, facecolor=face, linewidth=0)
            axis.add_patch(box)
            ink = colors["muted"] if value is None else "#ffffff" if place > 0.55 else "#14181d"
            axis.text(x, y, text(value), ha="center", va="center", color=ink, fontsize=9)
    axis.set_xlim(-0.5, len(heads) - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks(range(len(heads)), heads)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0, labelcolor=colors["ink"])
    axis.set_xlabel(label)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return figure


def share_words(analysis: Analysis, shares: Shares) -> str:
    """Return shares of the variance for those who can not see them."""
    found = ", ".join(f"{n} {wording.percent(p.value, 0)}" for n, p in shares.parts.items())
    return f"{_title(analysis, shares.column)}: {found}."


def shares(analysis: Analysis, own: Sequence[Shares], colors: Palette) -> Any:
    """Draw what varies, one bar a task."""
    title = f"{own[0].model} · {own[0].level} · what varies"
    subtitle = f"estimator: {', '.join(dict.fromkeys(s.estimator for s in own))}"
    figure, axis = canvas.new_figure(1.6 + 0.32 * len(own), title, subtitle, colors)
    names = list(dict.fromkeys(part for shares in own for part in shares.parts))
    left = np.zeros(len(own))
    for number, name in enumerate(names):
        widths = np.array([s.parts[name].value if name in s.parts else 0.0 for s in own]) * 100
        color = colors["muted"] if name == "draw" else colors.series(_PARTS + number)
        axis.barh(
            range(len(own)), widths, 0.72, left, color=color, label=canvas.label(name),
            edgecolor=colors["paper"], linewidth=0.8,
        )  # fmt: skip
        for y, width in enumerate(widths):
            if width >= 9:
                place = left[y] + width / 2
                axis.text(place, y, f"{width:.0f}", ha="center", va="center", color=colors["paper"])
        left += widths
    axis.set_yticks(range(len(own)), [canvas.wrapped(_title(analysis, s.column)) for s in own])
    axis.set_ylim(len(own) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.tick_params(axis="y", length=0, labelcolor=colors["ink"])
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("share of the variance of one draw [%]")
    canvas.legend(figure, axis, colors)
    return figure


def _title(analysis: Analysis, task: str) -> str:
    return next((wording.heading(c) for c in analysis.columns if c.task == task), task)
