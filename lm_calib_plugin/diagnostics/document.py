"""What a diagnosis is shown as: text for a screen, one HTML file, plots, and JSON for programs."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from lm_calib_plugin import storage
from lm_calib_plugin.drawing import page, rendered, words
from lm_calib_plugin.drawing.markup import Markup, join, lines, tag
from lm_calib_plugin.drawing.svg import Palette
from lm_calib_plugin.drawing.words import one_line
from lm_calib_plugin.errors import UserError

_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Table:
    """A table: names of its columns, and rows of texts and numbers (None: nothing to say).

    ``caption`` says what the columns mean, with units; ``shown`` is how many rows a screen gets
    (all others stand in the page, and the JSON has all).
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    shown: int = 20


@dataclass(frozen=True)
class Figure:
    """A plot: ``title``, how to read it, what it says in words, and what paints it.

    ``paint`` takes a :class:`~lm_calib_plugin.drawing.svg.Palette` and returns a figure, made with
    :func:`~lm_calib_plugin.drawing.canvas.new_figure`.
    """

    title: str
    reading: str
    description: str
    paint: Callable[[Palette], Any]


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, sentences, tables, plots, and ``quotes`` (title and text)."""

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    quotes: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Document:
    """A whole report.

    Parameters
    ----------
    title
        What was asked, of which model.
    findings
        The answer, in sentences; these come first everywhere.
    facts
        What was looked at: model, text, recipe, versions, hashes.
    sections
        The evidence.
    data
        All of it as plain values, for programs.
    """

    title: str
    findings: Sequence[str]
    facts: Mapping[str, Any]
    sections: Sequence[Section]
    data: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Return it for a screen."""
        found = [one_line(self.title), ""]
        found += [f"* {one_line(finding)}" for finding in self.findings]
        width = max((len(name) for name in self.facts), default=0)
        found += ["", *(f"{name:<{width}}  {one_line(v)}" for name, v in self.facts.items())]
        for section in self.sections:
            if section.sentences or section.tables:
                found += ["", f"## {one_line(section.title)}", *map(one_line, section.sentences)]
            for table in section.tables:
                found += ["", *_text_table(table)]
        return "\n".join(found)

    def html(self, plots: Mapping[str, Sequence[Markup]] | None = None) -> str:
        """Return it as one page; ``plots`` are SVG elements by title of the section."""
        style = (resources.files(__package__) / "document.css").read_text("utf-8")
        body = join(
            [
                tag("header", tag("h1", self.title)),
                tag("main", self._findings(), *self._sections(plots or {}), self._facts()),
                tag("footer", tag("p", "Written by lm-calib inspect; it asks no network.")),
            ],
            "\n",
        )
        return page.document(self.title, body, style)

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write ``NAME.html``, ``NAME.txt``, ``NAME.json`` and a PNG and SVG for each plot.

        Returns
        -------
        list of Path
            The files, the page first. Without matplotlib there are no plots, and this is said.
        """
        files: dict[str, str | bytes] = {}
        inline: dict[str, list[Markup]] = {}
        if rendered.available():
            with rendered.settings():
                for section in self.sections:
                    for number, figure in enumerate(section.figures):
                        part = f"{name}-{file_name(figure.title)}"
                        drawn = rendered.rendered(
                            figure.paint, f"{part}-{number}", figure.title, figure.description
                        )
                        files[f"{part}.png"], files[f"{part}.svg"] = drawn.png, drawn.svg
                        inline.setdefault(section.title, []).append(_figure(figure, drawn.inline))
        elif any(section.figures for section in self.sections):
            told = f"lm-calib: {words.NO_PLOTS} To install it: {words.INSTALL_PLOTS}\n"
            sys.stderr.write(told)
        texts = {
            f"{name}.html": self.html(inline),
            f"{name}.txt": self.text() + "\n",
            f"{name}.json": json.dumps(_plain(self.data), indent=1) + "\n",
        }
        for file, content in (texts | files).items():
            raw = content.encode() if isinstance(content, str) else content
            storage.write_bytes(folder / file, raw)
        return [folder / file for file in texts | files]

    def _findings(self) -> Markup:
        items = [tag("li", finding) for finding in self.findings]
        return tag("section", tag("h2", "What was found"), tag("ul", *items), cls="findings")

    def _facts(self) -> Markup:
        pairs = [
            tag("div", tag("dt", name), tag("dd", str(value))) for name, value in self.facts.items()
        ]
        return tag("section", tag("h2", "What was looked at"), tag("dl", *pairs))

    def _sections(self, plots: Mapping[str, Sequence[Markup]]) -> list[Markup]:
        found = []
        for section in self.sections:
            drawn = plots.get(section.title)
            found.append(
                tag(
                    "section",
                    tag("h2", section.title),
                    *(tag("p", sentence) for sentence in section.sentences),
                    tag("div", *drawn, cls="figures") if drawn else None,
                    *(_html_table(table) for table in section.tables),
                    *(_quote(title, text) for title, text in section.quotes),
                )
            )
        return found


def check_out(out: str | None, name: str = "out") -> Path | None:
    """Return a folder to write to, None for none.

    Raises
    ------
    UserError
        When it is a file, or stands in one; before any work.
    """
    if out is None:
        return None
    folder = Path(out).expanduser()
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(name, f"{path} is a file", "name a folder")
    return folder


def file_name(title: str) -> str:
    """Return a title as a part of a file name."""
    return _NOT_IN_NAMES.sub("-", title.lower()).strip("-")[:80]


def shown(value: Any) -> str:
    """Return a value as a table shows it: numbers with four digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return one_line(value)


def _text_table(table: Table) -> list[str]:
    rows = [[shown(value) for value in row] for row in table.rows[: table.shown]]
    texts = [list(map(one_line, table.head)), *rows]
    widths = [max(len(line[i]) for line in texts) for i in range(len(table.head))]
    right = _numeric(table)
    cells = [
        [
            text.rjust(w) if r else text.ljust(w)
            for text, w, r in zip(line, widths, right, strict=True)
        ]
        for line in texts
    ]
    found = ["  ".join(line).rstrip() for line in cells]
    left = len(table.rows) - table.shown
    found += [f"... and {left} more rows in the report"] if left > 0 else []
    return found + ([one_line(table.caption)] if table.caption else [])


def _numeric(table: Table) -> list[bool]:
    """Tell which columns hold numbers alone."""
    columns = range(len(table.head))
    return [
        all(isinstance(row[i], (int, float, type(None))) for row in table.rows) for i in columns
    ]


def _html_table(table: Table) -> Markup:
    right = ["num" if numeric else "" for numeric in _numeric(table)]
    head = [
        tag("th", name, cls=cls, scope="col") for name, cls in zip(table.head, right, strict=True)
    ]
    rows = [
        tag("tr", *(tag("td", shown(v), cls=cls) for v, cls in zip(row, right, strict=True)))
        for row in table.rows
    ]
    caption = tag("caption", table.caption) if table.caption else None
    inner = tag("table", caption, tag("thead", tag("tr", *head)), tag("tbody", *rows))
    return tag("div", inner, cls="scroll", tabindex=0)


def _figure(figure: Figure, inline: str) -> Markup:
    caption = tag("figcaption", figure.reading, cls="hint")
    return tag("figure", Markup(inline), caption)


def _quote(title: str, text: str) -> Markup:
    return tag("details", tag("summary", title), tag("pre", lines(text)))


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: what is not a number becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
