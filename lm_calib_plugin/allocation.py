"""From an allocation to a method for every layer, with counts that meet the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin import engine
from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.dense import dense_pass
from lm_calib_plugin.engine.ranks import Ranks
from lm_calib_plugin.engine.watched import HOST, bytes_of, copied
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.pruning.allocations.base import (
    LayerFacts,
    apportion,
    meet_budget,
)
from lm_calib_plugin.pruning.masks import removed_count
from lm_calib_plugin.pruning.pipeline import Pipeline
from lm_calib_plugin.statistics import LayerStats, Moments

LISTED_WITHIN = 0.005
WHOLE = 1e-6


class _Energies:
    """Second moments per token of the inputs of all layers, from one pass of the dense model."""

    def __init__(self) -> None:
        self.found: dict[str, LayerStats] = {}

    def wants(self, index: int) -> bool:
        return True

    def start(self, index: int, groups: Sequence[Sequence[engine.TargetLayer]]) -> list[Moments]:
        return [Moments.empty(g[0].shape[1], g[0].device) for g in groups]

    def listen(
        self, state: list[Moments], chunk: Chunk, number: int, rows: Tensor, owners: Tensor
    ) -> None:
        if not chunk.heldout:
            weights = chunk.weights_of(owners)
            state[number].update(rows, weights)

    def finish(
        self, index: int, groups: Sequence[Sequence[engine.TargetLayer]], state: list[Moments]
    ) -> None:
        for group, stats in zip(groups, state, strict=True):
            self.found |= {layer.name: stats.per_token() for layer in group}


def check_allocation(layers: Sequence[engine.TargetLayer], method: Pipeline) -> None:
    """Refuse an allocation that does not fit, as far as that can be told before data is read.

    Raises
    ------
    UserError
        When the output head is among the layers, for a group or pattern beside one threshold, and
        when a rule that looks at no activations refuses these layers.
    """
    allocation = method.allocation
    if allocation is None:
        return
    if any(layer.block == engine.HEAD for layer in layers):
        raise UserError(
            "allocation",
            "the output head is among the layers, which belongs to no block",
            "layers of the decoder blocks, or allocation=uniform",
        )
    if allocation.whole_layer and (method.n_of_m or method.group not in (None, "layer")):
        given = method.pattern if method.n_of_m else f"group={method.group}"
        raise UserError(
            "allocation",
            f"`global` compares whole layers, got {given}",
            "unstructured pruning with group=layer",
        )
    assert method.score is not None
    if allocation.statistic == "none" and not allocation.whole_layer:
        facts = [LayerFacts(x.name, x.block, x.shape, x.read) for x in layers]
        allocation.fractions(facts, float(method.sparsity), method.score)


def allocate(
    model: nn.Module,
    blocks: engine.Blocks,
    chunks: Callable[[], list[Chunk]],
    layers: Sequence[engine.TargetLayer],
    method: Pipeline,
    device: torch.device,
    progress: bool = True,
    inputs: str | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Pipeline]:
    """Return the method for every layer, by name.

    Unless the allocation takes its fractions as they are, as many weights go as with ``uniform``,
    to within one weight of each comparison group.

    Parameters
    ----------
    chunks
        Makes the calibration chunks; called when the allocation looks at activations.
    layers
        Targeted layers inside the blocks.
    method
        The method with its strength for all layers together.
    inputs
        Name of what goes through the model, where its statistics may be shared; see
        :mod:`lm_calib_plugin.engine.sharing`.
    ranks
        The processes that divide the pass over the dense model, unless its statistics are shared.

    Raises
    ------
    UserError
        When the allocation does not fit the layers, the score or the pattern.
    """
    allocation = method.allocation
    assert allocation is not None
    assert method.score is not None
    found: dict[str, LayerStats] = {}
    looks = allocation.statistic != "none"
    if looks or (allocation.whole_layer and method.score.statistic != "none"):
        where = model, blocks, chunks, layers, device, progress
        found = _shared_energies(inputs, *where) if inputs else _energies(*where, ranks)[0]
    facts = [LayerFacts(x.name, x.block, x.shape, x.read, found.get(x.name)) for x in layers]
    wanted = allocation.fractions(facts, float(method.sparsity), method.score)
    if allocation.keeps_budget and not allocation.whole_layer:
        sizes = [layer.size for layer in facts]
        wanted = list(meet_budget([float(w) for w in wanted], sizes, float(method.sparsity)))
    if method.n_of_m:
        return _with_patterns(facts, wanted, method)
    if not allocation.whole_layer and allocation.keeps_budget:
        wanted = _counted(facts, [float(w) for w in wanted], method)
    group = {"group": "layer"} if allocation.whole_layer else {}
    return {
        fact.name: dataclasses.replace(method, sparsity=share, **group)
        for fact, share in zip(facts, wanted, strict=True)
    }


def _energies(
    model: nn.Module,
    blocks: engine.Blocks,
    chunks: Callable[[], list[Chunk]],
    layers: Sequence[engine.TargetLayer],
    device: torch.device,
    progress: bool,
    ranks: Ranks | None = None,
) -> tuple[dict[str, LayerStats], bool]:
    """Return second moments per token by name of the layer, and whether chunks were halved."""
    visitor = _Energies()
    where = layers, visitor, device, progress, "allocation", ranks
    work = dense_pass(model, blocks, chunks(), *where)
    return visitor.found, work.halved


def _shared_energies(inputs: str, model: nn.Module, *rest: Any) -> dict[str, LayerStats]:
    """Return what :func:`_energies` does, from an earlier run with the same inputs if it can be."""
    shared = engine.shared_here()
    assert shared is not None
    layers = rest[2]
    name = ("energies", inputs, type(model), tuple(layer.name for layer in layers))
    found = shared.recall(name)
    if found is None:
        fresh, halved = _energies(model, *rest)
        if not halved:
            shared.keep(name, copied(fresh, HOST), bytes_of(fresh))
        return fresh
    return {x.name: copied(found[x.name], x.device) for x in layers}


def strength_found(
    method: Pipeline,
    layers: Sequence[engine.TargetLayer],
    methods: Mapping[str, Pipeline],
    asked: float | None,
) -> Pipeline:
    """Return the method with the strength that its layers have together.

    Raises
    ------
    UserError
        When fractions that were taken as they are do not remove what was asked for.
    """
    assert method.allocation is not None
    if method.allocation.keeps_budget or method.n_of_m:
        return method
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
    removed = [float(methods[x.name].sparsity) * n for x, n in zip(layers, sizes, strict=True)]
    found = sum(removed) / sum(sizes)
    if asked is not None and abs(found - asked) > LISTED_WITHIN:
        raise UserError(
            "sparsity",
            f"the listed fractions remove {found:.4f} of the weights, got {asked:g}",
            fix="drop `sparsity`, or list other fractions",
        )
    return dataclasses.replace(method, sparsity=found)


def _counted(
    facts: Sequence[LayerFacts], wanted: Sequence[float], method: Pipeline
) -> list[float | Fraction]:
    """Round fractions to counts a group; together they remove what ``uniform`` would."""
    group = method.group_in_force
    if group == "block128":
        # Blocks of a layer may differ in width: each is rounded down by itself.
        return list(wanted)
    widths = [fact.shape[1] if group == "row" else fact.size for fact in facts]
    units = [fact.shape[0] if group == "row" else 1 for fact in facts]
    total = sum(
        removed_count(width, method.sparsity) * unit
        for width, unit in zip(widths, units, strict=True)
    )
    real = [share * width for share, width in zip(wanted, widths, strict=True)]
    counts = apportion(real, units, total, [width - 1 for width in widths])
    return [Fraction(count, width) for count, width in zip(counts, widths, strict=True)]


def _with_patterns(
    facts: Sequence[LayerFacts],
    wanted: Sequence[float | Fraction],
    method: Pipeline,
) -> dict[str, Pipeline]:
    """Return methods with whole numbers kept of every M, the same in all layers of a block."""
    assert method.n_of_m is not None
    assert method.allocation is not None
    keep, of = method.n_of_m
    numbers = list(dict.fromkeys(fact.block for fact in facts))
    sizes = {b: sum(f.size for f in facts if f.block == b) for b in numbers}
    share = {f.block: float(w) for f, w in zip(facts, wanted, strict=True)}
    real = [share[b] * of for b in numbers]
    if method.allocation.keeps_budget:
        units = [sizes[b] // of for b in numbers]
        total = (of - keep) * sum(units)
        counts = apportion(real, units, total, [of - 1] * len(numbers))
    else:
        for fraction, count in zip(share.values(), real, strict=True):
            if abs(count - round(count)) > WHOLE:
                raise UserError(
                    "allocation",
                    f"{fraction:g} is no whole number of every {of}",
                    f"fractions of {of}, to go with pattern={method.pattern}",
                )
        counts = [min(round(r), of - 1) for r in real]
    gone = dict(zip(numbers, counts, strict=True))
    made = {}
    for fact in facts:
        removed = gone[fact.block]
        made[fact.name] = (
            dataclasses.replace(method, pattern=f"{of - removed}:{of}")
            if removed
            else dataclasses.replace(method, pattern="unstructured", sparsity=0.0)
        )
    return made
