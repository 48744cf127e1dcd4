"""What ``lm-calib ls`` prints: methods and their stages, sources, packings, selectors, options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields

from lm_calib_plugin import registry
from lm_calib_plugin.corpora import CORPORA
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime
from lm_calib_plugin.schemes import SCHEMES
from lm_calib_plugin.stages import STAGES

_KINDS: dict[str, tuple[registry.Kind, ...]] = {
    "methods": ("pruning", "quantization"),
    "allocations": ("allocation",),
    "scores": ("score",),
    "refinements": ("refinement",),
    "updates": ("update",),
    "transforms": ("transform",),
    "grids": ("grid",),
    "roundings": ("rounding",),
    "observers": ("observer",),
    "sources": ("calibration", "mixture"),
    "packings": ("packing",),
    "selections": ("selection",),
}


def print_list(what: str) -> None:
    """Print the tables of one kind of thing: a key of the kinds above, or ``options``."""
    if what == "schemes":
        _print_table(("scheme", "weights", "activations"), _scheme_rows())
    elif what == "options":
        _print_table(("option", "default", "meaning"), option_rows())
    else:
        _print_table(("name", "what it is", "paper", "from"), _part_rows(what))
    if what == "sources":
        print()
        header = ("corpus", "what it is", "short for", "license", "revision")
        _print_table(header, _corpus_rows())


def _part_rows(what: str) -> Iterator[tuple[str, ...]]:
    for kind in _KINDS[what]:
        for entry in registry.table(kind).values():
            yield entry.name, _described(entry), entry.paper, _origin(entry.distribution)
        for kept, ignored in registry.shadowed(kind):
            note = f"not used: the name belongs to {kept.distribution}"
            yield ignored.name, note, "", _origin(ignored.distribution)


def _scheme_rows() -> Iterator[tuple[str, ...]]:
    for name, scheme in SCHEMES.items():
        groups = "a scale a channel"
        if scheme.group_size != -1:
            groups = f"groups of {scheme.group_size}"
        inputs = "as they are"
        if scheme.act_bits:
            ranges = "a range a token" if scheme.act_dynamic else "calibrated ranges"
            ranges = groups if scheme.fixed else ranges
            inputs = f"{scheme.act_bits}-bit {scheme.number}, {ranges}"
        yield name, f"{scheme.bits}-bit {scheme.number}, {groups}", inputs


def _described(entry: registry.Entry) -> str:
    """Return the summary, with the options of a part or the stages of a pipeline."""
    own = [f"{name}={value}" for name, value in entry.stages]
    if not own and entry.kind in STAGES.values() and entry.options:
        own = [f"options: {', '.join(entry.options)}"]
    return entry.summary + (f" ({', '.join(own)})" if own else "")


def _corpus_rows() -> Iterator[tuple[str, ...]]:
    for name, row in CORPORA.items():
        revision = row.revision or "looked up and recorded when drawn from"
        yield name, row.summary, f"hf:{row.place()}", row.licence, revision


def _origin(distribution: str) -> str:
    """Return ``name version``: installing a distribution is trusting it, so it is always shown."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:  # run from a source tree
        return distribution


def option_rows() -> Iterator[tuple[str, ...]]:
    """Return name, default and meaning of every field of a recipe and of a runtime."""
    meanings = documented(Recipe) | documented(Runtime)
    defaults = {
        name: "required" if field.is_required() else field.default
        for name, field in Recipe.model_fields.items()
    } | {field.name: field.default for field in fields(Runtime)}
    for name, default in defaults.items():
        shown = "" if default is None or default == () else str(default)
        yield name, shown.lower() if isinstance(default, bool) else shown, meanings.get(name, "")


def documented(cls: type) -> dict[str, str]:
    """Return what the "Parameters" of a numpy docstring say, by name."""
    text = inspect.getdoc(cls) or ""
    _, _, section = text.partition("Parameters\n----------\n")
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in re.split(r"\n\n\w+\n---", section)[0].splitlines():
        if line and not line[0].isspace():
            names = [name.strip() for name in line.split(":")[0].split(",")]
        for name in names if line[:1].isspace() else ():
            plain = re.sub(r":\w+:`~?([^`]*)`|``?([^`]*)``?", r"\1\2", line.strip())
            meanings[name] = f"{meanings.get(name, '')} {plain}".strip()
    return meanings


def _print_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a file or a pipe: keep each row on one line, as grep likes it
        console = Console(width=400)
    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
