"""The figures themselves: values to marks. Callers choose the colors and write the files."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm_calib_plugin.export.card_text import one_line
from lm_calib_plugin.leaderboard import wording
from lm_calib_plugin.leaderboard.arrange import Group
from lm_calib_plugin.leaderboard.svg import Palette
from lm_calib_plugin.leaderboard.tables import (
    DATA_FREE,
    DENSE,
    Analysis,
    Column,
    Entry,
    Heat,
    Ranking,
    Shares,
)

WIDTH = 4.5  # inches of 72 units: what a phone shows without making texts smaller
_MARKERS = "osD^vPX"
_VIOLIN = 5
_ROW = 0.27
_PARTS = 4  # colors of shares: not those of the first calibrations
# From little to much; the steps of lightness are even, so gray is read the same.
_RAMP = ("#f3f6fa", "#d3e0ee", "#a6c3de", "#6f9fca", "#3b78b0", "#1c5488", "#0d335c")


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
    rows = sum(_wrapped(line.name).count("\n") + 1 for line in lines)
    title = f"{panel.model} · {panel.method}"
    figure, axis = _figure(2.8 + 0.2 * -(-rows // 2), title, name_of(column), colors)
    places = sorted({x for line in lines for x, *_ in line.points})
    gap = min(np.diff(places), default=0.1)
    for number, line in enumerate(lines):
        x, mean, low, high = np.array(line.points).T
        shift = (number - (len(lines) - 1) / 2) * gap * 0.035
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
            label=_label(line.name + (" (no data)" if line.series is None else "")),
        )
    dense = _dense(analysis, panel.model, column)
    if dense is not None:
        axis.axhline(dense, color=colors["ink"], linewidth=1, linestyle=":")
        axis.annotate(
            "dense", (0.99, dense), xycoords=("axes fraction", "data"), ha="right",
            va="bottom", xytext=(0, 1), textcoords="offset points", color=colors["ink"],
        )  # fmt: skip
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.set_xlabel(one_line(panel.axis or "level"))
    axis.set_ylabel(one_line(column.unit))
    axis.grid(axis="y", color=colors["grid"], linewidth=0.7)
    axis.set_axisbelow(True)
    _legend(figure, axis, colors)
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
        if len(found) > 1 or found[0].calibration:
            rows.append(method)
        found.sort(key=lambda entry: names.get(entry.calibration, -1))
        rows += found
    title = f"{group.title} · single draws"
    figure, axis = _figure(1.1 + _ROW * len(rows), title, name_of(column), colors)
    for y, row in enumerate(rows):
        if isinstance(row, str):
            continue
        color = colors["muted"]
        if row.role != DATA_FREE:
            color = colors.series(names[row.calibration])
        values = np.array(row.scores[column.task].draws)
        _outline(axis, values, y, color)
        axis.plot(values, np.full(len(values), y), "o", color=color, markersize=4, alpha=0.75)
        mean = row.scores[column.task].mean
        axis.plot([mean, mean], [y - 0.32, y + 0.32], color=colors["ink"], linewidth=1.6)
    dense = _dense(analysis, group.model, column)
    if dense is not None:
        axis.axvline(dense, color=colors["ink"], linewidth=1, linestyle=":")
        axis.annotate("dense ", (dense, -0.55), ha="right", va="center", color=colors["ink"])
    labels = [r if isinstance(r, str) else r.calibration or r.method for r in rows]
    axis.set_yticks(range(len(rows)), [_wrapped(label) for label in labels])
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


def _outline(axis: Any, values: Any, y: float, color: str) -> None:
    """Draw the estimated density of enough draws that differ."""
    from scipy.stats import gaussian_kde

    if len(values) < _VIOLIN or np.ptp(values) <= 1e-9 * max(1.0, float(np.abs(values).max())):
        return
    sd = values.std(ddof=1)
    place = np.linspace(values.min() - sd, values.max() + sd, 41)
    density = gaussian_kde(values)(place)
    half = 0.4 * density / density.max()
    axis.fill_between(place, y - half, y + half, color=color, alpha=0.22, linewidth=0)


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
    text: Any,
    label: str,
    colors: Palette,
) -> Any:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    ramp = LinearSegmentedColormap.from_list("ramp", _RAMP)
    rows = [_wrapped(name) for name in names]
    lines = max((name.count("\n") + 1 for name in rows), default=1)
    height = max(0.34, 0.17 * lines) * len(rows)
    heads = [_wrapped(head, max(5, 40 // max(1, len(heads)))) for head in heads]
    figure, axis = _figure(1.25 + height, *titles, colors)
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
    figure, axis = _figure(1.6 + 0.32 * len(own), title, subtitle, colors)
    names = list(dict.fromkeys(part for shares in own for part in shares.parts))
    left = np.zeros(len(own))
    for number, name in enumerate(names):
        widths = np.array([s.parts[name].value if name in s.parts else 0.0 for s in own]) * 100
        color = colors["muted"] if name == "draw" else colors.series(_PARTS + number)
        axis.barh(
            range(len(own)), widths, 0.72, left, color=color, label=_label(name),
            edgecolor=colors["paper"], linewidth=0.8,
        )  # fmt: skip
        for y, width in enumerate(widths):
            if width >= 9:
                place = left[y] + width / 2
                axis.text(place, y, f"{width:.0f}", ha="center", va="center", color=colors["paper"])
        left += widths
    axis.set_yticks(range(len(own)), [_wrapped(_title(analysis, s.column)) for s in own])
    axis.set_ylim(len(own) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.tick_params(axis="y", length=0, labelcolor=colors["ink"])
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("share of the variance of one draw [%]")
    _legend(figure, axis, colors)
    return figure


def _title(analysis: Analysis, task: str) -> str:
    return next((wording.heading(c) for c in analysis.columns if c.task == task), task)


def _calibrations(analysis: Analysis) -> dict[str, int]:
    """Return calibration -> number of its color, the same in all figures."""
    names = (e.calibration for e in analysis.entries if e.role not in (DENSE, DATA_FREE))
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _dense(analysis: Analysis, model: str, column: Column) -> float | None:
    for entry in analysis.entries:
        if (entry.role, entry.model) == (DENSE, model) and column.task in entry.scores:
            return entry.scores[column.task].mean
    return None


def _wrapped(text: str, width: int = 24) -> str:
    return "\n".join(textwrap.wrap(one_line(text), width)) or " "


def _label(name: str) -> str:
    text = _wrapped(name)
    return " " + text if text.startswith("_") else text  # matplotlib hides such names


def _legend(figure: Any, axis: Any, colors: Palette) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=2, frameon=False,
        labelcolor=colors["ink"], handlelength=1.8, columnspacing=1.2,
    )  # fmt: skip


def _engine(figure: Any) -> Any:
    return figure.get_layout_engine()


def _figure(height: float, title: str, subtitle: str, colors: Palette) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title, subtitle = _wrapped(title, 50), _wrapped(subtitle, 60)
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
