"""Give the layers of one block new weights, and write down what came of it."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.engine import notes
from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.correction import input_shift
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.layers import HEAD, TargetLayer
from lm_calib_plugin.engine.plan import Plan, WalkResult
from lm_calib_plugin.engine.ranks import Ranks
from lm_calib_plugin.engine.tuning import BlockTuning
from lm_calib_plugin.engine.watched import HOST, Watched
from lm_calib_plugin.errors import NumericalError, named
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.report import LayerRow
from lm_calib_plugin.statistics import LayerStats
from lm_calib_plugin.statistics.sample import relative_error


@dataclass
class Solved:
    """What there is to say of layers that were solved together, beside their weights.

    ``written`` and ``moved`` are those whose weight, or bias, is another one now; ``unseen`` those
    that no token reached. All by name.
    """

    rows: list[LayerRow] = field(default_factory=list)
    grids: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)


class Solver:
    """Compresses layers whose inputs have been watched.

    Parameters
    ----------
    plan, blocks, chunks
        What to do, and the data for methods that look at whole blocks.
    result
        Takes rows, grids and warnings.
    progress
        Whether methods that take long show a bar.
    ranks
        The processes that divide the layers; each layer is solved by one, which gives it to all.
    timed
        Does work, and counts its seconds to a stage.
    """

    def __init__(
        self,
        plan: Plan,
        blocks: Blocks,
        chunks: list[Chunk],
        result: WalkResult,
        progress: bool,
        ranks: Ranks,
        timed: Callable[[str, Callable[[], Any]], Any],
    ) -> None:
        self.ranks, self.timed = ranks, timed
        self.plan, self.blocks, self.chunks = plan, blocks, chunks
        self.result, self.progress = result, progress
        # Tokens that experts borrowed, by name; layers that saw none.
        self.borrowed: dict[str, int] = {}
        self.unseen: list[str] = []

    def solve(self, layers: Sequence[TargetLayer], watched: Mapping[int, Watched]) -> None:
        """Compress layers of one block; ``watched`` is by ``id(layer)``.

        Those that a method rounds together with their block are rounded together; of the others,
        those that share an input and a method are handed over together, each by the process that
        owns their statistics.
        """
        roundings = {id(layer): self.plan.method_of(layer).block_rounding for layer in layers}
        # Layers may keep their weights: with 16 bits, for all or by name.
        alone = [layer for layer in layers if roundings[id(layer)] is None]
        if len(alone) == len(layers) or not self.chunks or layers[0].block == HEAD:
            alone, together = list(layers), []
        else:
            together = [layer for layer in layers if layer not in alone]
        units = self._units(alone, watched)
        dealt = self.ranks.owners([self.cost(unit) for unit in units])
        owners = [
            watched[id(unit[0])].owner if id(unit[0]) in watched else owner
            for unit, owner in zip(units, dealt, strict=True)
        ]

        def solve() -> dict[int, Solved]:
            return {
                number: self._solve_unit(unit, watched.get(id(unit[0])))
                for number, unit in enumerate(units)
                if owners[number] == self.ranks.rank
            }

        solved = self.timed("compress", solve)
        if self.ranks.several:
            solved = self.timed("exchange", lambda: self._spread(units, owners, solved))
        found = [solved[number] for number in range(len(units))]
        if together:
            rounding = roundings[id(together[0])]
            found.append(
                self.timed("compress", lambda: self._round_block(together, watched, rounding))
            )
        for one in found:
            self.result.rows += one.rows
            self.result.grids |= one.grids
            self.result.warnings += one.warnings
            self.unseen += one.unseen

    def cost(self, layers: Sequence[TargetLayer]) -> float:
        """Return about how much work layers are that share an input, in no unit."""
        out, width = sum(layer.shape[0] for layer in layers), layers[0].shape[1]
        if "gram" not in self.plan.statistic:
            return float(out * width)
        # The factor of the matrix once, then every row against all columns.
        return float(width**3 + out * width**2)

    def _spread(
        self,
        units: Sequence[Sequence[TargetLayer]],
        owners: Sequence[int],
        mine: Mapping[int, Solved],
    ) -> dict[int, Solved]:
        """Give what each process solved to all: the weights, and what is said of them."""
        hosted = {
            number: dataclasses.replace(one, grids=_moved(one.grids, lambda _name: HOST))
            for number, one in mine.items()
        }
        every: dict[int, Solved] = {}
        for said in self.ranks.exchange("solved", hosted):
            every |= said
        devices = {layer.name: layer.device for unit in units for layer in unit}
        changed: dict[int, list[Tensor]] = {}
        for number, (unit, owner) in enumerate(zip(units, owners, strict=True)):
            found, tensors = every[number], changed.setdefault(owner, [])
            tensors += [layer.stored for layer in unit if layer.name in found.written]
            biases = [layer.bias for layer in unit if layer.name in found.moved]
            tensors += [bias for bias in biases if bias is not None]
        # Nothing between the words and the tensors may fail in one process alone.
        for owner, tensors in changed.items():
            self.ranks.spread(tensors, owner)
        for number, owner in enumerate(owners):
            if owner == self.ranks.rank:
                every[number] = mine[number]
            else:
                every[number].grids = _moved(every[number].grids, devices.__getitem__)
        return every

    def _units(
        self, layers: Sequence[TargetLayer], watched: Mapping[int, Watched]
    ) -> list[list[TargetLayer]]:
        """Return the layers by what they have in common: watched input, and method."""
        units: list[tuple[int | None, Method, list[TargetLayer]]] = []
        for layer in layers:
            seen, method = watched.get(id(layer)), self.plan.method_of(layer)
            key = None if seen is None else id(seen)
            same = [u for k, m, u in units if k == key and m == method] if key else []
            if same:
                same[0].append(layer)
            else:
                units.append((key, method, [layer]))
        return [unit for _, _, unit in units]

    def _solve_unit(self, layers: Sequence[TargetLayer], seen: Watched | None) -> Solved:
        start = time.perf_counter()
        before = [layer.read() for layer in layers]
        stats = seen.stats if seen else None
        method, solved = self.plan.method_of(layers[0]), Solved()
        if stats is not None and not stats.tokens:
            solved.unseen += [layer.name for layer in layers]
        if method.keeps_weights:
            results = [LayerResult(weight) for weight in before]
        else:
            targets = before
            if seen is not None:
                targets = [self._target(x, w, seen) for x, w in zip(layers, before, strict=True)]
            results = self._compressed(method, layers, targets, stats)
            solved.warnings += notes.of_damp(method, layers, results)
        spent = (time.perf_counter() - start) / sum(weight.numel() for weight in before)
        for layer, weight, result in zip(layers, before, results, strict=True):
            start = time.perf_counter() - spent * weight.numel()
            self._store(layer, weight, result, seen, start, solved)
        return solved

    def _round_block(
        self, layers: Sequence[TargetLayer], watched: Mapping[int, Watched], rounding: Any
    ) -> Solved:
        start, solved = time.perf_counter(), Solved()
        index = layers[0].block
        before = {layer.name: layer.read() for layer in layers}
        grids = {}
        for layer in layers:
            seen = watched.get(id(layer))
            method: Any = self.plan.method_of(layer)
            grids[layer.name] = method.fit_grid(
                before[layer.name], seen.stats if seen else None, layer.parameter.dtype
            )
        problem = BlockTuning(self.blocks.modules[index], layers, self.chunks, index)
        with named(f"{self.blocks.path}.{index}"):
            found = rounding.round_block(problem, grids, self.progress)
        for layer in layers:
            seen = watched.get(id(layer))
            self._store(layer, before[layer.name], found[layer.name], seen, start, solved)
        return solved

    def _store(
        self,
        layer: TargetLayer,
        before: Tensor,
        result: LayerResult,
        seen: Watched | None,
        start: float,
        solved: Solved,
    ) -> None:
        """Write a result into the model, and note what there is to say of it."""
        if result.weight is not before:
            self._check(layer, result)
            if not torch.equal(result.weight, before):
                layer.write(result.weight)
                solved.written.append(layer.name)
            if result.bias is not None:
                layer.add_to_bias(result.bias)
                solved.moved.append(layer.name)
        solved.warnings += [f"{layer.name}: {note}" for note in result.notes]
        if result.grid is not None:
            solved.grids[layer.name] = result.grid
        solved.rows.append(self._row(layer, before, result, seen, start))

    def _target(self, layer: TargetLayer, before: Tensor, seen: Watched) -> Tensor:
        """Return the weight that brings the outputs nearest to those of the dense model."""
        if seen.cross is None:
            return before
        if seen.shift is None:
            with named(layer.name):
                seen.shift = input_shift(seen.stats, seen.cross)
        return before + self.plan.method.correction * (before @ seen.shift.t())

    def _compressed(
        self,
        method: Method,
        layers: Sequence[TargetLayer],
        weights: Sequence[Tensor],
        stats: LayerStats | None,
    ) -> list[LayerResult]:
        dtype = layers[0].parameter.dtype
        with named(", ".join(layer.name for layer in layers)):
            return method.compress_together(weights, stats, dtype)

    def _check(self, layer: TargetLayer, result: LayerResult) -> None:
        found = [result.weight] if result.bias is None else [result.weight, result.bias]
        if not all(bool(x.to(layer.parameter.dtype).isfinite().all()) for x in found):
            raise NumericalError(layer.name, "result", "NaN or Inf after compression", "raise damp")

    def _row(
        self,
        layer: TargetLayer,
        before: Tensor,
        result: LayerResult,
        seen: Watched | None,
        start: float,
    ) -> LayerRow:
        after, grid = layer.read(), result.grid
        return LayerRow(
            name=layer.name,
            shape=layer.shape,
            removed=float((after == 0).sum()) / max(1, after.numel()),
            bits=grid.bits if grid is not None else None,
            error_calibration=_error(layer, before, after, seen, False) if seen else None,
            error_heldout=_error(layer, before, after, seen, True) if seen else None,
            damp=result.damp,
            tokens=seen.used.seen if seen else None,
            seconds=round(time.perf_counter() - start, 4),
            asked=self._asked(layer),
            borrowed=self.borrowed.get(layer.name),
            fallback=result.fallback,
            details=result.details,
            **({} if grid is None else notes.grid_facts(grid, before, layer)),
        )

    def _asked(self, layer: TargetLayer) -> str | float | None:
        options = self.plan.method_of(layer).options() if layer.name in self.plan.methods else {}
        pattern, share = options.get("pattern"), options.get("sparsity")
        return share if pattern in (None, "unstructured") else pattern


def _error(
    layer: TargetLayer, before: Tensor, after: Tensor, seen: Watched, heldout: bool
) -> float | None:
    """Return the relative output error on a sample of rows."""
    known = None if seen.energies is None else seen.energies.of(layer.name, before, heldout)
    return relative_error(before, after, (seen.heldout if heldout else seen.used).rows(), known)


def _moved(grids: Mapping[str, Any], place: Callable[[str], torch.device]) -> dict[str, Any]:
    """Return copies of grids, by name of the layer, on the devices that ``place`` gives."""
    found = {}
    for name, grid in grids.items():
        made = copy.copy(grid)
        for part, value in vars(grid).items():
            if isinstance(value, Tensor):
                # Grids are frozen.
                object.__setattr__(made, part, value.to(place(name)))
        found[name] = made
    return found
