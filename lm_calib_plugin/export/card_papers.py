"""What the registry knows of the parts of a recipe: summaries, papers, data sets on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.export.card_text import cell, link, plain
from lm_calib_plugin.expression import parse_calibration
from lm_calib_plugin.registry import STAGES, Entry, JointEntry

_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def method_cell(method: str) -> str:
    """Return a method and its summary, for a table."""
    try:
        summary = registry.find_method(method).summary
    except UserError:  # of a package that is not installed here
        summary = ""
    return cell(method) + (f": {plain(summary)}" if summary else "")


def papers(recipe: Mapping[str, Any]) -> str:
    """Return a list of the papers behind the parts of a recipe, each by its link."""
    found: dict[str, list[str]] = {}
    for entry in _entries(recipe):
        if entry.paper and entry.name not in found.setdefault(entry.paper, []):
            found[entry.paper].append(entry.name)
    rows = [f"- {', '.join(map(plain, names))}: {link(url, url)}" for url, names in found.items()]
    return "\n".join(rows) or "- none known to the program that wrote this card"


def every_source(sources: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the records of sources, and of those inside them."""
    for source in sources:
        yield source
        yield from every_source(source.get("inner") or ())
        yield from every_source((source.get("set") or {}).get("sources") or ())


def hub_datasets(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the data sets of the hub that text was drawn from."""
    found = []
    for source in every_source(sources):
        name = source.get("dataset")
        text = str(source.get("source", ""))
        if text.startswith("hf:"):
            name = re.split(r"[:?(]", text.removeprefix("hf:"))[0]
        if isinstance(name, str) and _DATASET.fullmatch(name):
            found.append(name)
    return list(dict.fromkeys(found))


def _entries(recipe: Mapping[str, Any]) -> Iterator[Entry]:
    try:
        method = registry.find_method(str(recipe["method"]))
    except UserError:
        return
    halves = [method]
    if isinstance(method, JointEntry):
        halves = [half for half in (method.pruning, method.quantization) if half is not None]
    yield from halves
    named = {field: recipe.get(field) for field in STAGES}
    kinds: dict[str, Any] = {**STAGES, "pack": "packing", "select": "selection"}
    named |= {"pack": recipe.get("pack"), "select": recipe.get("select")}
    for field, value in named.items():
        for part in re.split(r"[+>]", str(value or "")):
            entry = registry.table(kinds[field]).get(part.partition("?")[0].strip())
            if entry is not None:
                yield entry
    try:
        terms = parse_calibration(recipe.get("calibration") or "none")
    except UserError:
        return
    known = {**registry.table("calibration"), **registry.table("mixture")}
    for term in terms:
        for name in (term.name, *(inner.name for inner in term.inner)):
            if name in known:
                yield known[name]
