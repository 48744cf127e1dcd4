"""Figures of quality and of single draws. Callers choose the colors and write the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm_calib_plugin.drawing import canvas
from lm_calib_plugin.drawing.svg import Palette
from lm_calib_plugin.drawing.words import one_line
from lm_calib_plugin.leaderboard.report import wording
from lm_calib_plugin.leaderboard.report.arrange import Group
from lm_calib_plugin.leaderboard.tables import (
    DATA_FREE,
    DENSE,
    PERPLEXITY,
    Analysis,
    Column,
    Entry,
)

_MARKERS = "osD^vPX"
_VIOLIN = 5
_ROW = 0.27


@dataclass(frozen=True)
class Panel:
    """One figure of quality: all calibrations of a method of a base model."""

    model: str
    method: str
    axis: str


@dataclass(frozen=True)
class Line:
    """One line of such a figure; points are (strength, mean, low, high)."""

    name: str
    series: int | None
    points: tuple[tuple[float, float, float, float], ...]

    def words(self, column: Column) -> str:
        """Return the line for those who can not see it."""
        found = (f"{wording.number(m, column.unit)} at {x:g}" for x, m, _, _ in self.points)
        return f"{self.name}: {', '.join(found)}."


def name_of(column: Column) -> str:
    """Return what an axis shows: task, metric, unit and direction."""
    better = "higher" if column.higher_is_better else "lower"
    return f"{wording.heading(column)}: {column.metric} [{column.unit}], {better} is better"


def panels(analysis: Analysis) -> list[Panel]:
    """Return the figures of quality; methods without data stand in those of the others."""
    able = [e for e in analysis.entries if e.role != DENSE and e.strength is not None]
    found = [Panel(e.model, e.method, e.strength_name) for e in able if e.role != DATA_FREE]
    for entry in able:
        panel = Panel(entry.model, entry.method, entry.strength_name)
        if not any((p.model, p.axis) == (panel.model, panel.axis) for p in found):
            found.append(panel)
    return list(dict.fromkeys(found))


def quality_lines(analysis: Analysis, panel: Panel, column: Column) -> list[Line]:
    """Return one line a calibration, and one a method without data."""
    names = _calibrations(analysis)
    found: dict[tuple[str, int | None], list[tuple[float, float, float, float]]] = {}
    for entry in analysis.entries:
        score = entry.scores.get(column.task)
        free = entry.role == DATA_FREE
        if (
            score is None
            or entry.role == DENSE
            or entry.strength is None
            or (entry.model, entry.strength_name) != (panel.model, panel.axis)
            or (entry.method != panel.method and not free)
        ):
            continue
        low = score.mean if score.low is None else score.low
        high = score.mean if score.high is None else score.high
        key = (entry.method, None) if free else (entry.calibration, names[entry.calibration])
        found.setdefault(key, []).append((entry.strength, score.mean, low, high))
    return [Line(name, series, tuple(sorted(p))) for (name, series), p in found.items()]


def quality(
    analysis: Analysis, panel: Panel, column: Column, lines: Sequence[Line], colors: Palette
) -> Any:
    """Draw quality against the fraction removed or the bits, the dense model as a line across."""
    rows = sum(canvas.wrapped(line.name).count("\n") + 1 for line in lines)
    title = f"{panel.model} · {panel.method}"
    figure, axis = canvas.new_figure(2.8 + 0.2 * -(-rows // 2), title, name_of(column), colors)
    places = sorted({x for line in lines for x, *_ in line.points})
    gap, side = min(np.diff(places), default=0.1), 0.035 if len(places) > 1 else 0.1
    for number, line in enumerate(lines):
        x, mean, low, high = np.array(line.points).T
        shift = (number - (len(lines) - 1) / 2) * gap * side
        color = colors["muted"] if line.series is None else colors.series(line.series)
        axis.errorbar(
            x + shift,
            mean,
            yerr=np.clip([mean - low, high - mean], 0, None),
            color=color,
            linestyle="--" if line.series is None else "-",
            marker=_MARKERS[(line.series or 0) % len(_MARKERS)],
            markersize=4.5,
            linewidth=1.5,
            elinewidth=1,
            capsize=2,
            label=canvas.label(line.name + (" (no data)" if line.series is None else "")),
        )
    dense = _dense(analysis, panel.model, column)
    if dense is not None:
        axis.axhline(dense, color=colors["ink"], linewidth=1, linestyle=":")
        axis.annotate(
            "dense", (0.99, dense), xycoords=("axes fraction", "data"), ha="right",
            va="bottom", xytext=(0, 1), textcoords="offset points", color=colors["ink"],
        )  # fmt: skip
    means = [mean for line in lines for _, mean, _, _ in line.points]
    means += [] if dense is None else [dense]
    if is_log(column, means):
        canvas.logarithmic(axis, "y", means)
    edge = gap * (side * len(lines) / 2 + (0.03 if len(places) > 1 else 0.4))
    axis.set_xlim(places[0] - edge, places[-1] + edge)
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.set_xlabel(one_line(panel.axis or "level"))
    axis.set_ylabel(one_line(column.unit))
    axis.grid(axis="y", color=colors["grid"], linewidth=0.7)
    axis.set_axisbelow(True)
    canvas.legend(figure, axis, colors)
    return figure


def draw_words(entry: Entry, column: Column) -> str:
    """Return one row of strips for those who can not see it."""
    score = entry.scores[column.task]
    mean = wording.number(score.mean, column.unit)
    return f"{wording.name(entry)}: mean {mean}, {wording.spread(score, column.unit)}."


def strips(analysis: Analysis, group: Group, column: Column, colors: Palette) -> Any:
    """Draw the scores of single draws, a row an entry, methods one below the other."""
    names = _calibrations(analysis)
    own = [row.entry for row in group.rows if column.task in row.entry.scores]
    methods = list(dict.fromkeys(entry.method for entry in own if entry.role != DENSE))
    rows: list[Entry | str] = []
    for method in methods:
        found = [e for e in own if e.method == method and e.role != DENSE]
        if len(found) > 1 or wording.calibration(found[0]):
            rows.append(method)
        found.sort(key=lambda entry: names.get(entry.calibration, -1))
        rows += found
    title = f"{group.title} · single draws"
    figure, axis = canvas.new_figure(1.1 + _ROW * len(rows), title, name_of(column), colors)
    dense = _dense(analysis, group.model, column)
    seen = [x for row in own for x in row.scores[column.task].draws]
    log = is_log(column, seen)
    for y, row in enumerate(rows):
        if isinstance(row, str):
            continue
        color = colors["muted"]
        if row.role != DATA_FREE:
            color = colors.series(names[row.calibration])
        values = np.array(row.scores[column.task].draws)
        _outline(axis, values, y, color, log)
        axis.plot(values, np.full(len(values), y), "o", color=color, markersize=4, alpha=0.75)
        mean = row.scores[column.task].mean
        axis.plot([mean, mean], [y - 0.32, y + 0.32], color=colors["ink"], linewidth=1.6)
    if dense is not None:
        axis.axvline(dense, color=colors["ink"], linewidth=1, linestyle=":")
        axis.annotate("dense ", (dense, -0.55), ha="right", va="center", color=colors["ink"])
    if log:
        canvas.logarithmic(axis, "x", seen)
    labels = [r if isinstance(r, str) else wording.calibration(r) or r.method for r in rows]
    axis.set_yticks(range(len(rows)), [canvas.wrapped(label) for label in labels])
    for tick, row in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_color(colors["ink"])
        if isinstance(row, str):
            tick.set_fontweight("bold")
    axis.set_ylim(len(rows) - 0.4, -1)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x", color=colors["grid"], linewidth=0.7)
    axis.set_axisbelow(True)
    axis.set_xlabel(one_line(column.unit))
    return figure


def is_log(column: Column, values: Sequence[float]) -> bool:
    """Tell whether scores are drawn by their logarithms: perplexities, and what spans much."""
    if not values or min(values) <= 0 or not np.isfinite(values).all():
        return False
    return column.unit == PERPLEXITY or wording.is_wide(values)


def _outline(axis: Any, values: Any, y: float, color: str, log: bool) -> None:
    """Draw the estimated density of enough draws that differ."""
    from scipy.stats import gaussian_kde

    if len(values) < _VIOLIN or np.ptp(values) <= 1e-9 * max(1.0, float(np.abs(values).max())):
        return
    values = np.log(values) if log else values
    sd = values.std(ddof=1)
    place = np.linspace(values.min() - sd, values.max() + sd, 41)
    density = gaussian_kde(values)(place)
    half = 0.4 * density / density.max()
    place = np.exp(place) if log else place
    axis.fill_between(place, y - half, y + half, color=color, alpha=0.22, linewidth=0)


def _calibrations(analysis: Analysis) -> dict[str, int]:
    """Return calibration -> number of its color, the same in all figures."""
    names = (e.calibration for e in analysis.entries if e.role not in (DENSE, DATA_FREE))
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _dense(analysis: Analysis, model: str, column: Column) -> float | None:
    for entry in analysis.entries:
        if (entry.role, entry.model) == (DENSE, model) and column.task in entry.scores:
            return entry.scores[column.task].mean
    return None
