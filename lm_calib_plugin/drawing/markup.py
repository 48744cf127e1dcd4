"""HTML of which no value can break out: whatever is not Markup is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from lm_calib_plugin.drawing.words import one_line

_NAME = re.compile(r"[a-z][a-z0-9-]*")
_PERCENT = re.compile(r"(\d) %")  # a line does not end in between
_EMPTY = {"input"}
_SHAPES = {"rect", "line", "circle"}  # of SVG, where an element without content must say so


class Markup(str):
    """A text that is HTML already."""

    __slots__ = ()


Content = str | Markup | None


def escape(value: str) -> Markup:
    """Return a text as it reads, on one line; a Markup as it is."""
    if isinstance(value, Markup):
        return value
    before, after = (" " if edge.isspace() else "" for edge in (value[:1], value[-1:]))
    text = _PERCENT.sub("\\1\u00a0%", html.escape(one_line(value)))
    return Markup(before + text + after)


def lines(value: str) -> Markup:
    """Return a text with its line ends, for blocks of code."""
    return Markup("\n".join(html.escape(one_line(line)) for line in value.splitlines()))


def tag(
    tag_name: str, *content: Content, cls: str = "", **attributes: str | float | bool | None
) -> Markup:
    """Return an element.

    Attributes: underscores become hyphens, None and False leave one out, True gives a bare one.
    """
    parts = [tag_name]
    given: dict[str, str | float | bool | None] = {"class": cls or None, **attributes}
    for name, value in given.items():
        name = name.rstrip("_").replace("_", "-")
        if not _NAME.fullmatch(name.lower()):
            raise ValueError(f"no name of an attribute: {name!r}")
        if value is True:
            parts.append(name)
        elif value is not None and value is not False:
            parts.append(f'{name}="{html.escape(one_line(value))}"')
    start = f"<{' '.join(parts)}>"
    if tag_name in _SHAPES:
        return Markup(f"{start[:-1]}/>")
    if tag_name in _EMPTY:
        return Markup(start)
    return Markup(f"{start}{join(content)}</{tag_name}>")


def join(parts: Iterable[Content], between: str = "") -> Markup:
    """Return parts one after the other; None is left out."""
    return Markup(between.join(escape(part) for part in parts if part is not None))
