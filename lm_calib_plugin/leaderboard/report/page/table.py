"""The tables of entries: filters, one body a model and level, each row with what made it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lm_calib_plugin.drawing.markup import Markup, join, tag
from lm_calib_plugin.leaderboard.report import wording
from lm_calib_plugin.leaderboard.report.arrange import Group, Row, groups, headline
from lm_calib_plugin.leaderboard.report.page import detail
from lm_calib_plugin.leaderboard.tables import (
    AVERAGES,
    COMPRESSED,
    DENSE,
    POINTS,
    Analysis,
    Column,
    Kept,
    Score,
)

Cell = tuple[float | str | None, list[Markup | str]]


@dataclass(frozen=True)
class Field:
    """A column of the page: what is sorted by, and what is shown. ``more``: hidden at first."""

    key: str
    title: str
    unit: str
    kind: str
    show: Callable[[Row, Group], Cell]
    falling: bool = True
    more: bool = False
    help: str = ""


def filters(analysis: Analysis) -> Markup:
    """Return the filter bar; it waits hidden for the script."""
    entries = analysis.entries
    menus = [
        ("model", "Model", (e.model for e in entries)),
        ("level", "Level", (e.level for e in entries if e.role != DENSE)),
        ("method", "Method", (e.method for e in entries)),
        ("calibration", "Calibration", (e.calibration for e in entries)),
        ("role", "Role", (e.role for e in entries)),
    ]
    search = tag(
        "label",
        tag("span", "Filter"),
        tag("input", type="search", name="q", placeholder="words; press /", autocomplete="off"),
        cls="search",
    )
    hide = _check("hide", "controls", "Hide controls")
    count = tag("output", cls="count", aria_live="polite")
    clear = tag("button", "Clear", type="button", cls="quiet", id="clear")
    found = [_menu(name, title, values) for name, title, values in menus]
    return tag(
        "form",
        search,
        *found,
        _sorting(analysis),
        hide,
        _chooser(analysis),
        tag("span", count, clear, cls="end"),
        id="filters",
        hidden=True,
        aria_label="Filters",
    )


def _menu(name: str, title: str, values: Iterable[str]) -> Markup:
    options = [tag("option", value, value=value) for value in dict.fromkeys(values) if value]
    everything = tag("option", "all", value="")
    return tag("label", tag("span", title), tag("select", everything, *options, name=name))


def _check(name: str, value: str, title: str, checked: bool = False) -> Markup:
    box = tag("input", type="checkbox", name=name, value=value, checked=checked)
    return tag("label", box, title, cls="check")


def _sorting(analysis: Analysis) -> Markup | None:
    """Return sorting for screens that have no table heads."""
    if analysis.no_ranking:
        return None
    options = [tag("option", "as in the report", value="")]
    options += [tag("option", f.title, value=f.key) for f in fields(analysis)]
    select = tag("select", *options, name="sort")
    return tag("label", tag("span", "Sort by"), select, cls="narrow")


def _chooser(analysis: Analysis) -> Markup:
    boxes = [
        _check("column", field.key, field.title, checked=not field.more)
        for field in fields(analysis)
        if field.key != "name"
    ]
    return tag("details", tag("summary", "Columns"), tag("div", *boxes), cls="chooser")


def table(analysis: Analysis) -> Markup:
    """Return all tables as one, with a body for each model and level: nothing is pooled."""
    shown = fields(analysis)
    sortable = not analysis.no_ranking
    head = tag("tr", *(_head(field, sortable) for field in shown))
    bodies = [_body(analysis, group, shown, place) for place, group in enumerate(groups(analysis))]
    caption = wording.legend(analysis, headline(analysis))
    if sortable:
        caption += " Sorting stays within a model and level."
    whole = tag(
        "table",
        tag("caption", caption),
        tag("thead", head),
        *bodies,
        cls="cards",
        id="entries",
    )
    nothing = tag("p", "No row fits these filters.", cls="hint", id="nothing", hidden=True)
    region = tag("div", whole, cls="scroll", tabindex=0, role="region", aria_label="Tables")
    return join([region, nothing])


def _head(field: Field, sortable: bool) -> Markup:
    unit = tag("small", field.unit) if field.unit else None
    cls = "num" if field.kind == "number" else ""
    title = field.help or None
    about: dict[str, str | None] = {"data_c": field.key, "scope": "col", "title": title}
    if not sortable:
        return tag("th", field.title, unit, cls=cls, **about)
    direction = "descending" if field.falling else "ascending"
    button = tag("button", field.title, unit, type="button", data_first=direction)
    return tag("th", button, cls=cls, data_kind=field.kind, **about)


def _body(analysis: Analysis, group: Group, shown: list[Field], place: int) -> Markup:
    title = tag("th", tag("span", group.title), colspan=len(shown), scope="rowgroup")
    rows = [tag("tr", title, cls="group")]
    for number, row in enumerate(group.rows):
        entry = row.entry
        id = f"r{place}-{number}"
        words = " ".join([entry.id, entry.model, group.level, entry.role]).lower()
        rows.append(
            tag(
                "tr",
                *(_cell(field, row, group, id) for field in shown),
                cls="row" + (" dense" if entry.role == DENSE else ""),
                data_model=entry.model,
                data_level=group.level,
                data_method=entry.method,
                data_calibration=entry.calibration,
                data_role=entry.role,
                data_words=words,
            )
        )
        more = detail.detail(analysis, entry)
        rows.append(tag("tr", tag("td", more, colspan=len(shown)), cls="more", id=id))
    return tag("tbody", *rows)


def _cell(field: Field, row: Row, group: Group, id: str) -> Markup:
    sort, content = field.show(row, group)
    value = None if sort is None else repr(sort) if isinstance(sort, float) else str(sort)
    if field.key == "name":
        label = f"Details of {wording.name(row.entry)}"
        arrow = tag("span", "›", aria_hidden="true")
        toggle = tag(
            "button", arrow, type="button", cls="toggle", aria_expanded="false",
            aria_controls=id, aria_label=label, hidden=True,
        )  # fmt: skip
        return tag("th", tag("div", toggle, *content), scope="row", data_c=field.key, data_v=value)
    return tag(
        "td",
        tag("div", *content),
        cls="num" if field.kind == "number" else "",
        data_c=field.key,
        data_v=value,
        data_label=" ".join(part for part in (field.title, field.unit) if part),
    )


def fields(analysis: Analysis) -> list[Field]:
    """Return the columns, the important ones first; tasks stand behind the average."""
    first = headline(analysis)
    found = [
        Field("rank", "Rank", "", "number", _rank, False, help="as far as differences resolve it"),
        Field("name", "Method, calibration", "", "text", _name, False),
        Field("draws", "Draws", "", "number", _draws),
        Field("worst", "Worst task", "kept", "number", _worst, help="retention of the worst task"),
        Field("geometric", "Geom. mean", "kept", "number", _kept("geometric_mean")),
    ]
    for column in sorted(analysis.columns, key=lambda c: (c is not first, c.task not in AVERAGES)):
        found.append(_score_field(analysis, column, column is first))
    found += [
        Field("mean", "Mean", "kept", "number", _kept("mean"), more=True),
        Field("recovery", "Recovery", "", "number", _kept("recovery"), more=True),
        Field("calibration", "Calibration", "", "text", _text("calibration"), False, more=True),
        Field("role", "Role", "", "text", _text("role"), False, more=True),
        Field("sparsity", "Removed", "fraction", "number", _number("sparsity"), more=True),
        Field("bits", "Bits", "per weight", "number", _number("bits"), more=True),
        Field(
            "tokens", "Calibration", "tokens", "number", _number("calibration_tokens"), more=True
        ),
    ]
    return found


def _rank(row: Row, group: Group) -> Cell:
    return (None if row.ranks is None else float(sum(row.ranks)), [row.rank or wording.NOTHING])


def _name(row: Row, group: Group) -> Cell:
    entry = row.entry
    parts: list[Markup | str] = [tag("b", entry.method or entry.role)]
    if entry.role not in (COMPRESSED, DENSE):
        parts.append(tag("span", entry.role, cls="tag"))
    if entry.failed or entry.missing:
        parts.append(tag("span", "incomplete", cls="tag bad"))
    if entry.leaked:
        parts.append(tag("span", "leaked", cls="tag bad"))
    calibration = wording.calibration(entry)
    if calibration:
        parts.append(tag("small", calibration))
    return f"{entry.method} {calibration}".strip(), [tag("div", *parts, cls="name")]


def _draws(row: Row, group: Group) -> Cell:
    entry = row.entry
    parts: list[Markup | str] = [str(len(entry.draws))]
    if entry.failed:
        parts.append(tag("small", f"{len(entry.failed)} failed"))
    if entry.missing:
        parts.append(tag("small", f"{len(entry.missing)} missing"))
    return float(len(entry.draws)), parts


def _worst(row: Row, group: Group) -> Cell:
    kept: Kept | None = row.entry.kept
    if kept is None or kept.worst is None:
        return None, [wording.NOTHING]
    width = min(100.0, max(0.0, kept.worst * 100))
    bar = tag(
        "svg",
        tag("rect", width=100, height=4, cls="trough"),
        tag("rect", width=round(width, 1), height=4, cls="fill"),
        viewBox="0 0 100 4", preserveAspectRatio="none", cls="meter", aria_hidden="true",
    )  # fmt: skip
    task = tag("small", kept.worst_task) if kept.worst_task else ""
    return kept.worst, [tag("b", wording.percent(kept.worst)), bar, task]


def _kept(name: str) -> Callable[[Row, Group], Cell]:
    def show(row: Row, group: Group) -> Cell:
        found: float | None = getattr(row.entry.kept, name) if row.entry.kept else None
        return found, [wording.percent(found)]

    return show


def _text(name: str) -> Callable[[Row, Group], Cell]:
    def show(row: Row, group: Group) -> Cell:
        found = str(getattr(row.entry, name))
        return found or None, [found or wording.NOTHING]

    return show


def _number(name: str) -> Callable[[Row, Group], Cell]:
    def show(row: Row, group: Group) -> Cell:
        found = getattr(row.entry, name)
        return found, [wording.NOTHING if found is None else f"{found:g}"[:12]]

    return show


def _score_field(analysis: Analysis, column: Column, first: bool) -> Field:
    def show(row: Row, group: Group) -> Cell:
        score = row.entry.scores.get(column.task)
        if score is None:
            return None, [wording.NOTHING]
        mean = tag("b", wording.short(score.mean, column.unit))
        parts: list[Markup | str] = [mean]
        if first:
            bounds = wording.bounds(score, column.unit)
            parts = [tag("div", _forest(score, group, column), mean, cls="lead")]
            parts += [tag("small", bounds)] if bounds else []
        parts.append(tag("small", wording.spread(score, column.unit)))
        return score.mean, parts

    unit = column.unit if column.unit != POINTS or first else ""
    unit = "" if column.task.endswith(unit) else unit  # "average perplexity" says it
    place = list(analysis.columns).index(column)
    help = wording.meaning(column)
    key = f"t{place}"
    rising = column.higher_is_better
    return Field(key, wording.heading(column), unit, "number", show, rising, help=help)


def _forest(score: Score, group: Group, column: Column) -> Markup | str:
    """Draw mean and interval on a scale that all rows of a table share; a wide one is of logs."""
    found = [row.entry.scores[column.task] for row in group.rows if column.task in row.entry.scores]
    bounds = [b for s in found for b in (s.low, s.high, s.mean) if b is not None]
    if not all(map(math.isfinite, bounds)):
        return ""
    scale = math.log if wording.is_wide(bounds) else float
    low, high = scale(min(bounds)), scale(max(bounds))
    if high <= low:
        return ""

    def place(value: float) -> float:
        return round(3 + 94 * (scale(value) - low) / (high - low), 1)

    parts = []
    for row in group.rows:
        dense = row.entry.scores.get(column.task)
        if row.entry.role == DENSE and dense is not None:
            x = place(dense.mean)
            parts.append(tag("line", x1=x, x2=x, y1=0, y2=14, cls="dense"))
    if score.low is not None and score.high is not None:
        parts.append(tag("line", x1=place(score.low), x2=place(score.high), y1=7, y2=7, cls="span"))
    parts.append(tag("circle", cx=place(score.mean), cy=7, r=2.6, cls="dot"))
    return tag("svg", *parts, viewBox="0 0 100 14", cls="forest", aria_hidden="true")
