"""Names of methods, calibration sources, packings and selectors, and where each one is implemented.

Built-in parts and parts of other installed packages stand in the same tables. A third party
declares an entry point in one of the groups ``lm_calib_plugin.pruning``,
``lm_calib_plugin.quantization``, ``lm_calib_plugin.calibration``, ``lm_calib_plugin.mixture``,
``lm_calib_plugin.packing`` or ``lm_calib_plugin.selection`` whose value is ``"module:Class"``; it
is imported only when its name is used.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lm_calib_plugin.corpora import CORPORA as CORPORA
from lm_calib_plugin.errors import UserError, listed, nearest

Kind = Literal["pruning", "quantization", "calibration", "mixture", "packing", "selection"]
KINDS: tuple[Kind, ...] = (
    "pruning",
    "quantization",
    "calibration",
    "mixture",
    "packing",
    "selection",
)
Nested = Literal["no", "one", "many", "varies"]
OURS = "lm-calib-plugin"


@dataclass(frozen=True)
class Entry:
    """One row of the table: a name, what it is, and where it lives (``"module:Class"``).

    ``needs_data`` and ``options`` (recipe fields that the part reads) repeat what the class says,
    so that arguments are checked before anything heavy is imported; a test keeps both equal.
    ``nested`` tells how many sources stand inside the parentheses of a source or mixture:
    ``no`` or ``one``, ``many`` (at least one), or ``varies`` (the class decides).
    """

    kind: Kind
    name: str
    target: str
    summary: str = ""
    paper: str = ""
    needs_data: bool = True
    options: tuple[str, ...] = ()
    distribution: str = OURS
    nested: Nested = "no"

    def load(self) -> Any:
        """Import and return the class."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


_PRUNING = "lm_calib_plugin.pruning."
_QUANTIZATION = "lm_calib_plugin.quantization."
_SOURCES = "lm_calib_plugin.calibration.sources."
_SEARCHED = "lm_calib_plugin.bank.searched:"
_BLENDS = "lm_calib_plugin.bank.blends:"
_SELECTORS = "lm_calib_plugin.calibration.selectors."
_PACKERS = "lm_calib_plugin.calibration.packers:"

_BUILTIN: tuple[Entry, ...] = (
    Entry(
        "pruning",
        "magnitude",
        _PRUNING + "magnitude:Magnitude",
        "smallest weights of each layer",
        "https://arxiv.org/abs/1506.02626",
        needs_data=False,
        options=("sparsity", "pattern", "compat"),
    ),
    Entry(
        "pruning",
        "wanda",
        _PRUNING + "wanda:Wanda",
        "smallest |weight| x input norm of each output row",
        "https://arxiv.org/abs/2306.11695",
        options=("sparsity", "pattern", "compat"),
    ),
    Entry(
        "pruning",
        "ria",
        _PRUNING + "ria:RIA",
        "smallest share of row and column x root of the input norm",
        "https://openreview.net/forum?id=Tr0lPx9woF",
        options=("sparsity", "pattern", "compat"),
    ),
    Entry(
        "pruning",
        "sparsegpt",
        _PRUNING + "sparsegpt:SparseGPT",
        "second-order mask, kept weights updated",
        "https://arxiv.org/abs/2301.00774",
        options=("sparsity", "pattern", "damp", "compat"),
    ),
    Entry(
        "quantization",
        "rtn",
        _QUANTIZATION + "rtn:RTN",
        "round to nearest",
        "https://arxiv.org/abs/2206.01861",
        needs_data=False,
        options=("bits", "group_size", "symmetric"),
    ),
    Entry(
        "quantization",
        "gptq",
        _QUANTIZATION + "gptq:GPTQ",
        "second-order rounding, column by column",
        "https://arxiv.org/abs/2210.17323",
        options=("bits", "group_size", "symmetric", "act_order", "damp", "compat"),
    ),
    Entry(
        "calibration",
        "self",
        _SOURCES + "self_generated:SelfGenerated",
        "self[:prefix], self:bos or self:chat: the model writes its own text",
        "https://arxiv.org/abs/2410.17711",
    ),
    Entry(
        "calibration",
        "file",
        _SOURCES + "files:Files",
        "file:PATH, a .txt, .jsonl or .parquet file or a folder of them",
    ),
    Entry(
        "calibration",
        "hf",
        _SOURCES + "hub:HubDataset",
        "hf:ORG/NAME[:config][:split][:column], or a local dataset folder",
    ),
    Entry(
        "calibration",
        "task",
        _SOURCES + "tasks:HarnessTask",
        "task:NAME, the training split of a harness task with its own prompt",
    ),
    Entry(
        "calibration",
        "set",
        _SOURCES + "sets:StoredSet",
        "set:DIR, a folder made by lm-calib calibrate",
    ),
    Entry(
        "calibration", "random", _SOURCES + "random_ids:RandomIds", "uniform token ids; a control"
    ),
    Entry(
        "calibration",
        "null",
        _SOURCES + "nulls:Null",
        "null:KIND, controls: random, ascii, ellipsis, shuffle(SOURCE), unigram(SOURCE)",
        "https://arxiv.org/abs/2405.20835",
        nested="varies",
    ),
    Entry(
        "mixture",
        "minimax",
        _SEARCHED + "Minimax",
        "minimax(A+B+C), shares for which the worst domain is as good as can be",
        nested="many",
    ),
    Entry(
        "mixture",
        "weighted",
        _SEARCHED + "Weighted",
        "weighted(A*0.7+B*0.3), shares for a mean over domains with this traffic",
        nested="many",
    ),
    Entry(
        "mixture",
        "no_worse",
        _SEARCHED + "NoWorse",
        "no_worse(A+B)?limit=1.1, the mean, with no domain worse than its own text by more",
        nested="many",
    ),
    Entry(
        "mixture",
        "cross",
        _BLENDS + "Cross",
        "cross(DOMAIN+GENERAL)?lambda=0.5, statistics of both, weighed",
        "https://arxiv.org/abs/2502.18424",
        nested="many",
    ),
    Entry(
        "mixture",
        "tasa",
        _BLENDS + "Tasa",
        "tasa(TARGET+A+B), shares of A and B with the gradient traces of the target",
        "https://arxiv.org/abs/2607.00908",
        nested="many",
    ),
    Entry(
        "packing",
        "longdoc",
        _PACKERS + "LongDocument",
        "one window inside one document longer than seqlen",
    ),
    Entry("packing", "concat", _PACKERS + "Concatenate", "documents joined, then cut into windows"),
    Entry(
        "packing",
        "windows",
        _PACKERS + "Windows",
        "documents joined, windows at random starts that may overlap",
        "https://arxiv.org/abs/2410.17711",
    ),
    Entry(
        "packing",
        "pad",
        _PACKERS + "Pad",
        "one document a row, cut at seqlen, pads excluded from every statistic",
    ),
    Entry(
        "packing",
        "icl",
        _PACKERS + "InContext",
        "several whole examples a row, joined by a blank line",
        "https://arxiv.org/abs/2410.07461",
        options=("icl_examples",),
    ),
    Entry(
        "packing",
        "multilen",
        _PACKERS + "SeveralLengths",
        "windows of 256 to 2048 tokens, each sequence counting alike",
        "https://arxiv.org/abs/2602.07465",
    ),
    Entry(
        "selection",
        "random",
        _SELECTORS + "random_choice:RandomChoice",
        "uniform without replacement; the baseline",
    ),
    Entry(
        "selection",
        "ppl_low",
        _SELECTORS + "perplexity:PerplexityLow",
        "at random from the third of lowest perplexity",
    ),
    Entry(
        "selection",
        "ppl_mid",
        _SELECTORS + "perplexity:PerplexityMiddle",
        "at random from the third of middle perplexity",
    ),
    Entry(
        "selection",
        "ppl_high",
        _SELECTORS + "perplexity:PerplexityHigh",
        "at random from the third of highest perplexity",
    ),
    Entry(
        "selection",
        "zip",
        _SELECTORS + "zip_words:ZipWords",
        "greedy cover of distinct tokens; needs no model",
        "https://arxiv.org/abs/2603.16105",
    ),
    Entry(
        "selection",
        "kmeans",
        _SELECTORS + "clusters:Clusters",
        "the medoid of each cluster of activations (COLA)",
        "https://arxiv.org/abs/2510.10618",
    ),
    Entry(
        "selection",
        "kcenter",
        _SELECTORS + "centers:FarthestFirst",
        "farthest first in activations",
        "https://arxiv.org/abs/1708.00489",
    ),
    Entry(
        "selection",
        "herding",
        _SELECTORS + "herding:Herding",
        "greedy matching of the pool's mean activation",
        "https://arxiv.org/abs/1203.3472",
    ),
    Entry(
        "selection",
        "cover",
        _SELECTORS + "cover:OutlierCover",
        "greedy cover of outlier channels (COVERCAL)",
        "https://arxiv.org/abs/2604.24008",
    ),
    Entry(
        "selection",
        "centroid",
        _SELECTORS + "centroid:Centroid",
        "greedy matching of the mean activation of select_target (ACDM)",
        "https://openreview.net/forum?id=pfw3saHzGU",
        options=("select_target",),
    ),
    Entry(
        "selection",
        "gram_dopt",
        _SELECTORS + "gram_dopt:DOptimal",
        "activations in all directions: greedy log det",
        "https://arxiv.org/abs/1207.6083",
    ),
    Entry(
        "selection",
        "grad_match",
        _SELECTORS + "grad_match:GradientMatch",
        "gradients like those of select_target, unlike each other (after LESS)",
        "https://arxiv.org/abs/2402.04333",
        options=("select_target",),
    ),
)


@functools.cache
def table(kind: Kind) -> dict[str, Entry]:
    """Return name -> entry of one kind, installed third-party parts included.

    A third-party part that uses a built-in name is ignored in favour of the built-in one and
    kept out of the table; ``lm-calib ls`` shows it with both distributions named.
    """
    rows = {entry.name: entry for entry in _BUILTIN if entry.kind == kind}
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
    """
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
            )
    known = [*table("pruning"), *table("quantization")]
    raise UserError(
        "method", f"no method `{name}`", nearest(name, known), f"installed: {listed(known)}"
    )
