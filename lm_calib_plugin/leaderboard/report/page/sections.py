"""Sections of the page that are no tables of entries: verdicts, checks, plots, notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lm_calib_plugin.drawing import words
from lm_calib_plugin.drawing.markup import Markup, join, tag
from lm_calib_plugin.leaderboard.report import sentences, wording
from lm_calib_plugin.leaderboard.report.plots import Plot
from lm_calib_plugin.leaderboard.tables import Analysis, Share, Shares

_KINDS = {
    "quality": "Quality against strength of compression",
    "draws": "Single draws",
    "tasks": "Calibration by task",
    "ranks": "Rank stability",
    "shares": "What varies",
}


def verdict(analysis: Analysis) -> Markup:
    """Return what the leaderboard says and does not say."""
    found = []
    for title, several in sentences.lines(analysis):
        if several:
            items = tag("ul", *(tag("li", _bold(s.lead), s.text) for s in several))
            found.append(tag("div", tag("h2", title), items))
    return tag("div", *found, cls="verdicts")


def _bold(lead: str) -> Markup | None:
    return join([tag("b", lead), ": "]) if lead else None


def checks(analysis: Analysis) -> Markup | None:
    """Return controls, the conditions of the records, and what columns measure."""
    marks = {True: ("✓", " passed: "), False: ("✗", " failed: "), None: ("–", ": ")}
    controls = []
    for control in wording.controls(analysis.controls):
        mark, word = marks[control.passed]
        state = "bad" if control.passed is False else "good" if control.passed else "open"
        controls.append(
            tag(
                "li",
                tag("span", mark, cls=f"mark {state}", aria_hidden="true"),
                tag("span", tag("strong", control.name), word, control.words),
            )
        )
    parts: list[Markup] = []
    if controls:
        parts.append(tag("ul", *controls, cls="controls"))
    conditions = wording.conditions(analysis)
    if conditions:
        parts.append(_folded(f"{len(conditions)} conditions", conditions))
    columns = [(wording.heading(c), wording.meaning(c)) for c in analysis.columns]
    if columns:
        parts.append(_folded(f"{len(columns)} columns and what they measure", columns))
    return join(parts) if parts else None


def _folded(title: str, pairs: Iterable[tuple[str, str]]) -> Markup:
    rows = (tag("div", tag("dt", key), tag("dd", text)) for key, text in pairs)
    return tag("details", tag("summary", title), tag("dl", *rows))


def plots(found: Sequence[Plot] | None, left_out: str = "") -> Markup | None:
    """Return all plots, by kind; figures go with the filters for model and level."""
    if found is None:
        install = tag("code", words.INSTALL_PLOTS)
        return tag("p", f"{words.NO_PLOTS} To install it: ", install, cls="hint")
    parts = []
    for kind in dict.fromkeys(plot.kind for plot in found):
        own = [plot for plot in found if plot.kind == kind]
        figures = [
            tag("figure", Markup(plot.inline), data_model=plot.model, data_level=plot.level)
            for plot in own
        ]
        readings = " ".join(dict.fromkeys(plot.reading for plot in own))
        readings += f" {left_out}" if kind == "ranks" and left_out else ""
        parts.append(
            tag(
                "div",
                tag("h3", _KINDS.get(kind, kind)),
                tag("p", readings, cls="hint"),
                tag("div", *figures, cls="figures"),
                cls="kind",
            )
        )
    return join(parts) if parts else None


def varies(analysis: Analysis) -> Markup | None:
    """Return shares of the variance, rankings of single draws and how rankings agree."""
    parts = []
    if analysis.shares:
        parts.append(_shares(analysis))
    if analysis.rankings and not analysis.no_ranking:
        parts.append(_rankings(analysis))
    if analysis.agreements and not analysis.no_ranking:
        parts.append(_agreements(analysis))
    return join(parts) if parts else None


def _shares(analysis: Analysis) -> Markup:
    names = list(dict.fromkeys(part for shares in analysis.shares for part in shares.parts))
    heads = ["Model, level", "Task", *names]
    rows = [
        tag(
            "tr",
            tag("th", f"{s.model} · {s.level}", scope="row"),
            _cell("Task", _heading(analysis, s.column)),
            *(_cell(name, *_share(s, name), cls="num") for name in names),
            data_model=s.model,
            data_level=s.level,
            cls="row",
        )
        for s in analysis.shares
    ]
    hint = tag("p", wording.shares(analysis), cls="hint")
    return join([hint, _plain_table("Shares of the variance", heads, rows)])


def _share(shares: Shares, name: str) -> list[Markup | str]:
    share: Share | None = shares.parts.get(name)
    if share is None:
        return [wording.NOTHING]
    parts: list[Markup | str] = [tag("b", wording.percent(share.value, 0))]
    if share.low is not None and share.high is not None:
        low, high = (f"{bound * 100:.0f}" for bound in (share.low, share.high))
        parts.append(tag("small", f"[{low}, {high}] %"))
    if name in shares.naive:
        parts.append(tag("small", f"naive {wording.percent(shares.naive[name], 0)}"))
    if share.clipped:
        parts.append(tag("small", "estimate below 0"))
    return parts


def _rankings(analysis: Analysis) -> Markup:
    rows = []
    for ranking in analysis.rankings:
        names = [wording.name(analysis.entry(id)) for id in ranking.entries]
        first = ranking.ranks[0][0] if ranking.ranks and ranking.ranks[0] else None
        tau = wording.NOTHING if ranking.tau is None else wording.number(ranking.tau)
        rows.append(
            tag(
                "tr",
                tag("th", f"{ranking.model} · {ranking.level} · {ranking.fixed}", scope="row"),
                _cell("Task", _heading(analysis, ranking.column)),
                _cell("By the means", tag("ol", *(tag("li", name) for name in names)), cls="order"),
                _cell("tau-b", tau, cls="num"),
                _cell("First stays first", wording.percent(first, 0), cls="num"),
                data_model=ranking.model,
                data_level=ranking.level,
                cls="row",
            )
        )
    heads = ["Model, level, fixed", "Task", "By the means", "tau-b", "First stays first"]
    hint = tag("p", wording.RANKINGS, cls="hint")
    return join([hint, _plain_table("Rankings of single draws", heads, rows)])


def _agreements(analysis: Analysis) -> Markup:
    parts = [tag("h3", "Do rankings agree?"), tag("p", wording.AGREEMENTS, cls="hint")]
    for found in analysis.agreements:
        rows = [
            tag(
                "tr",
                tag("th", name, scope="row"),
                *(
                    _cell(other, wording.tau(tau), cls="num")
                    for other, tau in zip(found.names, taus, strict=True)
                ),
                data_model=found.model,
                data_level=found.level,
                cls="row",
            )
            for name, taus in zip(found.names, found.taus, strict=True)
        ]
        title = wording.agreement(found)
        parts.append(_plain_table(title, [found.over, *found.names], rows, shown=True))
    return join(parts)


def _heading(analysis: Analysis, task: str) -> str:
    return next((wording.heading(c) for c in analysis.columns if c.task == task), task)


def _cell(label: str, *content: Markup | str, cls: str = "") -> Markup:
    return tag("td", tag("div", *content), data_label=label, cls=cls)


def _plain_table(
    caption: str, heads: Sequence[str], rows: Sequence[Markup], *, shown: bool = False
) -> Markup:
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in heads)))
    whole = tag(
        "table",
        tag("caption", caption if shown else tag("span", caption, cls="unseen")),
        head,
        tag("tbody", *rows),
        cls="cards plain",
    )
    return tag("div", whole, cls="scroll", tabindex=0, role="region", aria_label=caption)


def notes(analysis: Analysis) -> Markup | None:
    """Return what a reader has to know: notes, failures, what was not run."""
    parts = []
    if analysis.notes:
        parts.append(tag("ul", *(tag("li", note) for note in analysis.notes)))
    if analysis.failures:
        items = [
            tag("li", tag("strong", cell), ": ", tag("code", error))
            for cell, error in analysis.failures
        ]
        parts.append(join([tag("h3", f"Failed ({len(items)})"), tag("ul", *items)]))
    if analysis.missing:
        items = [tag("li", cell) for cell in analysis.missing]
        parts.append(join([tag("h3", f"Not run ({len(items)})"), tag("ul", *items)]))
    return join(parts) if parts else None
