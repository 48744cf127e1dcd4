"""The page as a whole: its policy, its sections, its style and its script."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from lm_calib_plugin.drawing import page
from lm_calib_plugin.drawing.markup import Markup, join, tag
from lm_calib_plugin.leaderboard.report import sentences
from lm_calib_plugin.leaderboard.report.page import pairs, sections, table
from lm_calib_plugin.leaderboard.report.plots import Plot, left_out
from lm_calib_plugin.leaderboard.tables import Analysis


def render(analysis: Analysis, plots: Sequence[Plot] | None = ()) -> str:
    """Return the page.

    Parameters
    ----------
    plots
        What ``plots.draw`` returned; None where they could not be drawn.
    """
    found = [
        _section("verdict", "", sections.verdict(analysis)),
        _section("checks", "Controls and conditions", sections.checks(analysis)),
        _section("tables", "Tables", table.filters(analysis), table.table(analysis)),
        _section("comparisons", "Comparisons", pairs.comparisons(analysis)),
        _section("plots", "Plots", sections.plots(plots, left_out(analysis))),
        _section("varies", "What varies", sections.varies(analysis)),
        _section("notes", "Notes and failures", sections.notes(analysis)),
    ]
    shown = [(id, title, section) for id, title, section in found if section is not None]
    body = join(
        [
            tag("a", "Skip to the tables", cls="skip", href="#tables"),
            _header(analysis, [(id, title) for id, title, _ in shown if title]),
            tag("main", _unranked(analysis), *(section for *_, section in shown)),
            tag(
                "footer",
                tag(
                    "p",
                    "Written by lm-calib leaderboard report. The same records give the same page;"
                    " it asks no network for anything.",
                ),
            ),
        ],
        "\n",
    )
    return page.document(analysis.name, body, _part("page.css"), _part("page.js"))


def _part(name: str) -> str:
    return (resources.files(__package__) / name).read_text("utf-8")


def _section(id: str, title: str, *content: Markup | None) -> tuple[str, str, Markup | None]:
    if not any(content):
        return id, title, None
    head = tag("h2", title, id=f"{id}-title") if title else None
    label = f"{id}-title" if title else None
    return id, title, tag("section", head, *content, id=id, tabindex=-1, aria_labelledby=label)


def _header(analysis: Analysis, sections: Sequence[tuple[str, str]]) -> Markup:
    links = [tag("a", title, href=f"#{id}") for id, title in sections]
    return tag(
        "header",
        tag(
            "div",
            tag("nav", *links, aria_label="Sections"),
            tag("button", "Dark", type="button", id="theme", cls="quiet", hidden=True),
            cls="bar",
        ),
        tag("h1", analysis.name),
        tag("p", analysis.description, cls="lede") if analysis.description else None,
    )


def _unranked(analysis: Analysis) -> Markup | None:
    if not analysis.no_ranking:
        return None
    return tag(
        "div",
        tag("strong", sentences.unranked(analysis) + "."),
        " Rows stand as in the grid and can not be sorted.",
        tag("ul", *(tag("li", reason) for reason in analysis.no_ranking)),
        cls="banner",
        role="note",
    )
