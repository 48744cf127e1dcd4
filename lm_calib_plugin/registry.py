"""Names of methods, their stages, calibration sources and more, and where each one is implemented.

Built-in parts and parts of other installed packages stand in the same tables. A third party
declares an entry point in one of the groups ``lm_calib_plugin.pruning``,
``lm_calib_plugin.quantization``, ``lm_calib_plugin.allocation``, ``lm_calib_plugin.score``,
``lm_calib_plugin.refinement``, ``lm_calib_plugin.update``, ``lm_calib_plugin.transform``,
``lm_calib_plugin.grid``, ``lm_calib_plugin.rounding``, ``lm_calib_plugin.observer``,
``lm_calib_plugin.calibration``,
``lm_calib_plugin.mixture``, ``lm_calib_plugin.packing`` or ``lm_calib_plugin.selection`` whose
value is ``"module:Class"``; it is imported only when its name is used. The rows of this package
stand in :mod:`lm_calib_plugin.builtin_parts`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from lm_calib_plugin.corpora import CORPORA as CORPORA
from lm_calib_plugin.errors import UserError, listed, nearest

Kind = Literal[
    "pruning",
    "quantization",
    "allocation",
    "score",
    "refinement",
    "update",
    "transform",
    "grid",
    "rounding",
    "observer",
    "calibration",
    "mixture",
    "packing",
    "selection",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Recipe field of a stage -> its kind, in the order in which the stages work.
PRUNING_STAGES: dict[str, Kind] = {
    "allocation": "allocation",
    "score": "score",
    "refine": "refinement",
    "update": "update",
}
QUANTIZATION_STAGES: dict[str, Kind] = {
    "transform": "transform",
    "grid": "grid",
    "rounding": "rounding",
    "observer": "observer",
}
STAGES = PRUNING_STAGES | QUANTIZATION_STAGES
Scope = Literal["layer", "model"]
Nested = Literal["no", "one", "many", "varies"]
OURS = "lm-calib-plugin"


@dataclass(frozen=True)
class Entry:
    """One row of the table: a name, what it is, and where it lives (``"module:Class"``).

    ``needs_data`` and ``options`` (recipe fields that the part reads) repeat what the class says,
    so that arguments are checked before anything heavy is imported; a test keeps both equal.
    ``nested`` tells how many sources stand inside the parentheses of a source or mixture:
    ``no`` or ``one``, ``many`` (at least one), or ``varies`` (the class decides). ``stages`` are
    the stages, and other defaults, that a name of a pruning pipeline stands for; ``uses_damp``
    tells whether a stage uses a ridge, ``uses_order`` whether it visits columns in an order.
    ``scope`` is ``model`` for methods that take whole parts out
    of a model, and for the updates that go with them.
    """

    kind: Kind | Literal["joint"]
    name: str
    target: str
    summary: str = ""
    paper: str = ""
    needs_data: bool = True
    options: tuple[str, ...] = ()
    distribution: str = OURS
    nested: Nested = "no"
    stages: tuple[tuple[str, Any], ...] = ()
    uses_damp: bool = False
    uses_order: bool = False
    scope: Scope = "layer"

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Recipe fields of the stages of a pipeline; empty for other methods."""
        of_kind = PRUNING_STAGES if self.kind == "pruning" else QUANTIZATION_STAGES
        return tuple(of_kind) if self.stages else ()

    def make(self, options: Mapping[str, Any]) -> Any:
        """Return the method with these options; a named pipeline adds its own stages.

        What it adds beside stages (a ridge, a group, a grid) is for its own score, update and
        rounding only.
        """
        own = dict(self.stages)
        for stage in ("score", "update", "rounding"):
            given, named = str(options.get(stage, "")), str(own.get(stage, "none"))
            if given and given.partition("?")[0] != named.partition("?")[0]:
                own = {k: v for k, v in own.items() if k in STAGES}
        return self.load().from_options({**own, **options})

    def load(self) -> Any:
        """Import and return the class."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


@functools.cache
def table(kind: Kind) -> dict[str, Entry]:
    """Return name -> entry of one kind, installed third-party parts included.

    A third-party part that uses a built-in name is ignored in favour of the built-in one and
    kept out of the table; ``lm-calib ls`` shows it with both distributions named.
    """
    from lm_calib_plugin.builtin_parts import BUILTIN

    rows = {entry.name: entry for entry in BUILTIN if entry.kind == kind}
    for entry in _installed(kind):
        rows.setdefault(entry.name, entry)
    return rows


@functools.cache
def _installed(kind: Kind) -> tuple[Entry, ...]:
    from importlib.metadata import entry_points

    return tuple(
        Entry(kind, point.name, point.value, distribution=point.dist.name if point.dist else "?")
        for point in entry_points(group=f"lm_calib_plugin.{kind}")
    )


def shadowed(kind: Kind) -> list[tuple[Entry, Entry]]:
    """Return pairs (kept, ignored) of parts that claim one name."""
    rows = table(kind)
    return [(rows[e.name], e) for e in _installed(kind) if rows[e.name] is not e]


def find(kind: Kind, name: str, argument: str) -> Entry:
    """Return the entry of a name, or raise a :class:`UserError` that names the nearest one."""
    rows = table(kind)
    if name in rows:
        return rows[name]
    mixtures = table("mixture") if kind == "calibration" else {}
    raise UserError(
        argument,
        f"no {kind} part `{name}`",
        nearest(name, [*rows, *mixtures]),
        f"installed: {listed(rows)}" + (f"; mixtures: {listed(mixtures)}" if mixtures else ""),
    )


def find_selector(name: str) -> Entry:
    """Return the entry of a selector; the row of a third-party one is completed from its class."""
    entry = find("selection", name, "select")
    if entry.distribution == OURS:
        return entry
    takes_target = getattr(entry.load(), "takes_target", False)
    return replace(entry, options=("select_target",) if takes_target else ())


def find_part(kind: Kind, name: str, argument: str) -> Entry:
    """Return the entry of a stage; the row of a third-party one is completed from its class."""
    entry = find(kind, name, argument)
    if entry.distribution == OURS:
        return entry
    part = entry.load()
    return replace(
        entry,
        paper=part.paper,
        # A rounding of whole blocks looks at data without a statistic.
        needs_data=part.statistic != "none" or getattr(part, "level", "") == "block",
        options=tuple(field.name.rstrip("_") for field in fields(part)),
        uses_damp=getattr(part, "uses_damp", False),
        uses_order=getattr(part, "uses_order", False),
        scope=getattr(part, "scope", "layer"),
    )


@dataclass(frozen=True)
class JointEntry(Entry):
    """The row of ``PRUNING+QUANTIZATION``: both in one pass over the blocks."""

    pruning: Entry | None = None
    quantization: Entry | None = None

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Recipe fields of the stages of both."""
        return tuple(STAGES)

    def make(self, options: Mapping[str, Any]) -> Any:
        """Return the joint method; each half gets the options that it reads.

        A correction is made once, by the pruning method where that uses the Gram matrix.
        """
        given = dict(options)
        correction = given.pop("correction", None)
        halves = {}
        for name in ("pruning", "quantization"):
            row: Entry = getattr(self, name)
            own = {k: v for k, v in given.items() if k in row.options}
            if name == "pruning" and own.get("damp") == "auto":
                # Only roundings choose a ridge.
                del own["damp"]
            halves[name] = row.make(own)
        if correction is not None:
            which = "pruning" if "gram" in halves["pruning"].statistic else "quantization"
            halves[which] = replace(halves[which], correction=correction)
        return self.load()(**halves)


def _joint(text: str) -> JointEntry:
    names = [name.strip() for name in text.split("+")]
    if not all(names):
        raise UserError(
            "method", f"got {text!r}", "PRUNING+QUANTIZATION", "for instance method=sparsegpt+gptq"
        )
    rows = [find_method(name) for name in names]
    kinds = [row.kind for row in rows]
    if kinds == ["quantization", "pruning"] and all(row.stages for row in rows):
        raise UserError(
            "method",
            f"got {text!r}: {listed(f'{r.name} ({r.kind})' for r in rows)}",
            "PRUNING+QUANTIZATION",
            f"did you mean {names[1]}+{names[0]}?",
        )
    if kinds != ["pruning", "quantization"] or not all(row.stages for row in rows):
        raise UserError(
            "method",
            f"got {text!r}: {listed(f'{r.name} ({r.kind})' for r in rows)}",
            "PRUNING+QUANTIZATION, two methods that work on weights",
            "for instance method=sparsegpt+gptq",
        )
    pruning, quantization = rows
    own = dict(pruning.stages) | dict(quantization.stages)
    return JointEntry(
        "joint",
        "+".join(names),
        "lm_calib_plugin.joint:Joint",
        "pruned, and what is left quantized",
        options=tuple(dict.fromkeys((*pruning.options, *quantization.options))),
        stages=tuple(own.items()),
        pruning=pruning,
        quantization=quantization,
    )


def nested_of(entry: Entry) -> Nested:
    """Return what stands inside the parentheses of a source or mixture.

    A mixture takes sources whoever wrote it; the source of a third party says so in its class
    attribute ``nested``, and is imported for that.
    """
    if entry.kind == "mixture":
        return "many"
    if entry.distribution == OURS or entry.kind != "calibration":
        return entry.nested
    found: Nested = getattr(entry.load(), "nested", "no")
    return found


def find_method(name: str) -> Entry:
    """Return the entry of a compression method of either kind.

    The row of a third-party method is completed from its class, which is imported for that.
    ``PRUNING+QUANTIZATION`` is a method, too.
    """
    if "+" in name:
        return _joint(name)
    for kind in ("pruning", "quantization"):
        rows = table(kind)
        if name in rows:
            entry = rows[name]
            if entry.distribution == OURS:
                return entry
            method = entry.load()
            return replace(
                entry,
                paper=method.paper,
                needs_data=method.statistic != "none",
                options=tuple(field.name for field in fields(method)),
                scope=getattr(method, "scope", "layer"),
            )
    known = [*table("pruning"), *table("quantization")]
    raise UserError(
        "method", f"no method `{name}`", nearest(name, known), f"installed: {listed(known)}"
    )
