"""Give the layers of one block new weights, and write down what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.engine import notes
from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.correction import input_shift
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.layers import HEAD, TargetLayer
from lm_calib_plugin.engine.plan import Plan, WalkResult
from lm_calib_plugin.engine.tuning import BlockTuning
from lm_calib_plugin.engine.watched import Watched
from lm_calib_plugin.errors import NumericalError, named
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.report import LayerRow
from lm_calib_plugin.statistics import LayerStats
from lm_calib_plugin.statistics.sample import relative_error


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
    """

    def __init__(
        self,
        plan: Plan,
        blocks: Blocks,
        chunks: list[Chunk],
        result: WalkResult,
        progress: bool,
    ) -> None:
        self.plan, self.blocks, self.chunks = plan, blocks, chunks
        self.result, self.progress = result, progress
        # Tokens that experts borrowed, by name; layers that saw none.
        self.borrowed: dict[str, int] = {}
        self.unseen: list[str] = []

    def solve(self, layers: Sequence[TargetLayer], watched: Mapping[int, Watched]) -> None:
        """Compress layers of one block; ``watched`` is by ``id(layer)``.

        Those that a method rounds together with their block are rounded together; of the others,
        those that share an input and a method are handed over together.
        """
        roundings = {id(layer): self.plan.method_of(layer).block_rounding for layer in layers}
        # Layers may keep their weights: with 16 bits, for all or by name.
        alone = [layer for layer in layers if roundings[id(layer)] is None]
        if len(alone) == len(layers) or not self.chunks or layers[0].block == HEAD:
            alone, together = list(layers), []
        else:
            together = [layer for layer in layers if layer not in alone]
        for unit in self._units(alone, watched):
            self._solve_unit(unit, watched.get(id(unit[0])))
        if together:
            self._round_block(together, watched, roundings[id(together[0])])

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

    def _solve_unit(self, layers: Sequence[TargetLayer], seen: Watched | None) -> None:
        start = time.perf_counter()
        before = [layer.read() for layer in layers]
        stats = seen.stats if seen else None
        method = self.plan.method_of(layers[0])
        if stats is not None and not stats.tokens:
            self.unseen += [layer.name for layer in layers]
        if method.keeps_weights:
            results = [LayerResult(weight) for weight in before]
        else:
            targets = before
            if seen is not None:
                targets = [self._target(x, w, seen) for x, w in zip(layers, before, strict=True)]
            results = self._compressed(method, layers, targets, stats)
        spent = (time.perf_counter() - start) / sum(weight.numel() for weight in before)
        for layer, weight, result in zip(layers, before, results, strict=True):
            self._store(layer, weight, result, seen, time.perf_counter() - spent * weight.numel())

    def _round_block(
        self, layers: Sequence[TargetLayer], watched: Mapping[int, Watched], rounding: Any
    ) -> None:
        start = time.perf_counter()
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
            self._store(layer, before[layer.name], found[layer.name], watched.get(id(layer)), start)

    def _store(
        self,
        layer: TargetLayer,
        before: Tensor,
        result: LayerResult,
        seen: Watched | None,
        start: float,
    ) -> None:
        """Write a result into the model, and its row into the report."""
        if result.weight is not before:
            self._check(layer, result)
            if not torch.equal(result.weight, before):
                layer.write(result.weight)
            if result.bias is not None:
                layer.add_to_bias(result.bias)
        self.result.warnings += [f"{layer.name}: {note}" for note in result.notes]
        if result.grid is not None:
            self.result.grids[layer.name] = result.grid
        self.result.rows.append(self._row(layer, before, result, seen, start))

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
            results = method.compress_together(weights, stats, dtype)
        asked = getattr(method, "damp", None)
        for layer, result in zip(layers, results, strict=True):
            if result.damp is not None and asked is not None and result.damp > asked:
                self.result.warnings.append(
                    f"{layer.name}: damp raised from {asked:g} to {result.damp:g} to factor the "
                    "Gram matrix"
                )
        return results

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
