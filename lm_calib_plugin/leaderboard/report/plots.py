"""Plots of a leaderboard, as PNG and as SVG that adapts to light and dark.

The same Analysis gives the same bytes. All are as wide as a phone, so that their texts can be read
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from lm_calib_plugin.drawing import svg
from lm_calib_plugin.drawing.rendered import rendered, settings
from lm_calib_plugin.drawing.words import one_line
from lm_calib_plugin.leaderboard.report import figures, flat, maps, wording
from lm_calib_plugin.leaderboard.report.arrange import Group, groups, headline
from lm_calib_plugin.leaderboard.tables import AVERAGES, POINTS, Analysis, Column, Ranking

KINDS = ("quality", "draws", "tasks", "ranks", "shares")

_CUT = "Scale of logarithms; bars that end at the edge reach further."
# With no more plots of ranks than this, methods within a calibration are drawn, too.
_FEW = 4


@dataclass(frozen=True)
class Plot:
    """One plot: where it belongs, what it says, and its files.

    ``inline`` is the SVG element for a page, ``svg`` the file. ``reading`` says how to read it.
    """

    name: str
    kind: str
    model: str
    level: str
    title: str
    reading: str
    png: bytes
    svg: str
    inline: str


@dataclass(frozen=True)
class _Plan:
    kind: str
    model: str
    level: str
    parts: tuple[str, ...]
    title: str
    reading: str
    description: str
    paint: Callable[[svg.Palette], Any]


def draw(analysis: Analysis) -> list[Plot]:
    """Return all plots, model by model and level by level; needs matplotlib."""
    with settings():
        return [_drawn(plan) for plan in _plans(analysis)]


def _drawn(plan: _Plan) -> Plot:
    name = f"{plan.kind}-{flat.file_name(plan.model, plan.level, *plan.parts)}"
    title = one_line(plan.title)
    place = (plan.model, plan.level, title, plan.reading)
    drawn = rendered(plan.paint, name, title, plan.description)
    return Plot(name, plan.kind, *place, drawn.png, drawn.svg, drawn.inline)


def _plans(analysis: Analysis) -> Iterator[_Plan]:
    columns = shown_columns(analysis)
    yield from _quality(analysis, columns)
    for group in groups(analysis):
        for column in columns:
            yield from _draws(analysis, group, column)
    yield from _heats(analysis)
    if not analysis.no_ranking:
        yield from _ranks(analysis)
    yield from _shares(analysis)


def shown_columns(analysis: Analysis) -> list[Column]:
    """Return what is plotted: the headline, and tasks of which no average is taken."""
    first = headline(analysis)
    averaged = {c.unit for c in analysis.columns if c.task in AVERAGES}
    return [
        c
        for c in analysis.columns
        if c is first or c.task in AVERAGES or (c.unit != POINTS and c.unit not in averaged)
    ]


def _quality(analysis: Analysis, columns: list[Column]) -> Iterator[_Plan]:
    for panel in figures.panels(analysis):
        for column in columns:
            lines = figures.quality_lines(analysis, panel, column)
            if not any(line.points for line in lines):
                continue
            means = [mean for line in lines for _, mean, _, _ in line.points]
            bars = "Mean over draws with its 95 % interval over draws and items."
            if figures.is_log(column, means):
                bars += f" {_CUT}"
            yield _Plan(
                "quality",
                panel.model,
                "",
                (panel.method, panel.axis, column.task),
                f"{panel.model} · {panel.method}: {column.task} against {panel.axis}",
                bars,
                f"{figures.name_of(column)} against {panel.axis}. "
                + " ".join(line.words(column) for line in lines),
                partial(figures.quality, analysis, panel, column, lines),
            )


def _draws(analysis: Analysis, group: Group, column: Column) -> Iterator[_Plan]:
    rows = [row.entry for row in group.rows if column.task in row.entry.scores]
    if not any(len(entry.draws) > 1 for entry in rows):
        return
    seen = [x for entry in rows for x in entry.scores[column.task].draws]
    log = " Scale of logarithms." if figures.is_log(column, seen) else ""
    yield _Plan(
        "draws",
        group.model,
        group.level,
        (column.task,),
        f"{group.title}: draws of {column.task}",
        f"One point a draw, a bar at the mean; an outline from five draws up.{log}",
        f"{figures.name_of(column)} of single draws. "
        + " ".join(figures.draw_words(entry, column) for entry in rows),
        partial(figures.strips, analysis, group, column),
    )


def _heats(analysis: Analysis) -> Iterator[_Plan]:
    for heat in analysis.heats:
        retention = heat.quantity == "retention"
        yield _Plan(
            "tasks",
            heat.model,
            heat.level,
            (heat.method, heat.quantity),
            f"{heat.model} · {heat.level} · {heat.method}: calibration by task",
            "Share of the dense model's score above chance that is left, mean over draws."
            if retention
            else "Log of the perplexity over that of the dense model, mean over draws; 0 is dense.",
            f"{heat.quantity} by calibration and task. " + maps.heat_words(heat),
            partial(maps.tasks, analysis, heat),
        )


def ranked(analysis: Analysis) -> list[Ranking]:
    """Return the rankings that are drawn: calibrations within a method, in the headline column.

    Methods within a calibration come with them where both together are few; the tables have all.
    """
    column = headline(analysis)
    own = [r for r in analysis.rankings if column is not None and r.column == column.task]
    if len(own) < _FEW:
        return own
    within = [r for r in own if {analysis.entry(id).method for id in r.entries} == {r.fixed}]
    return within or own


def left_out(analysis: Analysis) -> str:
    """Return what is not drawn, in a sentence; nothing where all is."""
    drawn, column = ranked(analysis), headline(analysis)
    if analysis.no_ranking or column is None or len(drawn) == len(analysis.rankings):
        return ""
    methods = {r.fixed for r in drawn} <= {entry.method for entry in analysis.entries}
    return (
        f"Rank stability is drawn for {len(drawn)} of {len(analysis.rankings)} rankings, those by"
        f" {wording.heading(column)}{' of calibrations within a method' if methods else ''};"
        " all stand in the table of rankings."
    )


def _ranks(analysis: Analysis) -> Iterator[_Plan]:
    for ranking in ranked(analysis):
        yield _Plan(
            "ranks",
            ranking.model,
            ranking.level,
            (ranking.fixed, ranking.column),
            f"{ranking.model} · {ranking.level} · {ranking.fixed}: rank stability",
            "How often a row takes each rank when every row has one draw.",
            maps.rank_words(analysis, ranking),
            partial(maps.ranks, analysis, ranking),
        )


def _shares(analysis: Analysis) -> Iterator[_Plan]:
    places = dict.fromkeys((shares.model, shares.level) for shares in analysis.shares)
    for model, level in places:
        own = [s for s in analysis.shares if (s.model, s.level) == (model, level) and s.parts]
        if not own:
            continue
        yield _Plan(
            "shares",
            model,
            level,
            (),
            f"{model} · {level}: what varies",
            "Shares of the variance of one draw's score; intervals stand in the table.",
            " ".join(maps.share_words(analysis, shares) for shares in own),
            partial(maps.shares, analysis, own),
        )
