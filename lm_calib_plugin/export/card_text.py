"""Markdown of which no value can break out: of its cell, its line, or its code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from lm_calib_plugin.drawing.words import CONTROL, one_line, writable

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#!|~&$@])")
_TICKS = re.compile(r"`+")
# What may stand in a link as it is.
_URL = re.compile(r"https://[\w.-]+(?:/[\w./%~:?=&#+-]*)?")


def plain(value: Any) -> str:
    """Return a text as it reads, wherever it stands in a line."""
    return _SPECIAL.sub(r"\\\1", one_line(value))


def code(value: Any) -> str:
    """Return a text as code inside a line."""
    text = one_line(value)
    fence = "`" * (1 + max((len(run) for run in _TICKS.findall(text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def cell(value: Any) -> str:
    """Return a text as code inside a table, where a bar would end the cell."""
    return code(value).replace("|", "\\|")


def block(text: str, language: str = "") -> str:
    """Return lines as a block of code."""
    lines = [CONTROL.sub(" ", line) for line in writable(text).splitlines()]
    longest = max((len(run) for run in _TICKS.findall(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence + language, *lines, fence])


def link(words: Any, url: str) -> str:
    """Return a link, or the words alone when the address is not a plain one."""
    return f"[{plain(words)}]({url})" if _URL.fullmatch(url) else plain(words)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def front_matter(values: dict[str, Any]) -> str:
    """Return plain values as the block that the hub reads at the beginning of a card."""
    text = yaml.safe_dump(_lines(values), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


def _lines(value: Any) -> Any:
    if isinstance(value, dict):
        return {one_line(key): _lines(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lines(part) for part in value]
    return one_line(value) if isinstance(value, str) else value
