"""Block by block: observe the inputs, compress the layers, pass the data on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.correction import input_shift
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.experts import ENOUGH, fill_up
from lm_calib_plugin.engine.layers import HEAD, TargetLayer
from lm_calib_plugin.engine.observe import InputGroups
from lm_calib_plugin.engine.passes import BlockPass
from lm_calib_plugin.engine.rows import rows
from lm_calib_plugin.errors import CalibError, NumericalError, named
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.report import LayerRow
from lm_calib_plugin.statistics import STATISTICS, LayerStats, TokenSample
from lm_calib_plugin.statistics.sample import relative_error

ERROR_TOKENS = 512


@dataclass(frozen=True)
class Plan:
    """What to do: one method on a list of layers.

    ``methods`` holds, by name, the layers that are treated otherwise than the rest.
    ``propagate`` is ``compressed`` or ``dense``: which model's hidden states the next block sees.
    """

    method: Method
    layers: Sequence[TargetLayer]
    propagate: str = "compressed"
    methods: Mapping[str, Method] = field(default_factory=dict)

    def method_of(self, layer: TargetLayer) -> Method:
        """Return the method as it treats one layer."""
        return self.methods.get(layer.name, self.method).for_layer(layer.name)


@dataclass
class WalkResult:
    """Rows of the report, seconds by stage, warnings, and the grids of quantized layers."""

    rows: list[LayerRow] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    grids: dict[str, Any] = field(default_factory=dict)
    pads: int = 0


@dataclass
class _Watched:
    """What is remembered of one distinct input.

    ``cross`` is ``X^T (Y - X)``, ``[in, in]``, where ``Y`` are the inputs in the dense model, and
    ``shift`` what follows from it for the weights of all layers that share the input.
    """

    stats: LayerStats | None
    used: TokenSample
    heldout: TokenSample
    finite: bool = True
    cross: Tensor | None = None
    shift: Tensor | None = None


def run(
    model: nn.Module,
    blocks: Blocks,
    chunks: list[Chunk],
    plan: Plan,
    device: torch.device,
    progress: bool = True,
) -> WalkResult:
    """Compress the layers of a plan in place.

    Parameters
    ----------
    model, blocks
        The model, in inference mode, and its decoder blocks.
    chunks
        Calibration chunks; empty when no data is used.
    device
        Where the model takes its inputs.

    Raises
    ------
    NumericalError
        For NaN or Inf in weights, activations or results; the layer is named. Blocks done before
        stay compressed in memory: load the model again.
    CalibError
        When even one sequence at a time does not fit in memory.
    """
    for layer in plan.layers:
        if not bool(layer.stored.isfinite().all()):
            raise NumericalError(layer.name, "weights", "NaN or Inf before compression")
    try:
        return _Walk(model, blocks, chunks, plan, device, progress).run()
    except torch.OutOfMemoryError as error:
        raise CalibError(
            f"out of memory outside the forward passes ({error}): the statistics or the solve of "
            "one layer do not fit. Use a device with more memory, or leave the widest layers out "
            "(ignore=...)."
        ) from error


class _Walk(BlockPass):
    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        chunks: list[Chunk],
        plan: Plan,
        device: torch.device,
        progress: bool,
    ) -> None:
        super().__init__(model, blocks, chunks, device)
        self.plan, self.progress = plan, progress
        self.borrowed: dict[str, int] = {}
        self.unseen: list[str] = []
        self.result = WalkResult(
            seconds=self.seconds, warnings=self.warnings, pads=sum(c.pads for c in chunks)
        )

    def run(self) -> WalkResult:
        by_block: dict[int, list[TargetLayer]] = {}
        for layer in self.plan.layers:
            by_block.setdefault(layer.block, []).append(layer)
        if self.chunks:
            self.timed("capture", self.capture)
        for chunk in self.chunks if self.corrects else ():
            assert chunk.hidden is not None
            chunk.dense = None if chunk.heldout else chunk.hidden.clone()
        bar = tqdm(
            range(len(self.blocks)),
            desc=f"{self.plan.method.label} blocks",
            disable=not self.progress,
        )
        # After the last block that holds a target, data only matters for the head.
        last = len(self.blocks) if HEAD in by_block else max(by_block, default=-1)
        for index in bar:
            layers = by_block.get(index, [])
            if not self.chunks:
                self.timed("compress", lambda layers=layers: self._compress(layers, {}))
            elif index <= last:
                self._block(index, layers, more=index < last)
        if HEAD in by_block:
            self.timed("compress", lambda: self._head(by_block[HEAD][0]))
        self._tell_of_experts()
        return self.result

    @property
    def corrects(self) -> bool:
        """Whether layers make up for the error of earlier blocks."""
        plan = self.plan
        return plan.method.correction > 0 and plan.propagate == "compressed" and bool(self.chunks)

    def _tell_of_experts(self) -> None:
        for names, what in (
            (
                self.unseen,
                "no calibration token: treated as if all their inputs were equally large",
            ),
            (
                list(self.borrowed),
                f"fewer tokens than {ENOUGH} for each input: filled up with the shared statistics "
                "of all experts of the layer",
            ),
        ):
            if names:
                self.result.warnings.append(f"{len(names)} layers ({names[0]}, ...) saw {what}")

    # --- stages --------------------------------------------------------------------------

    def _block(self, index: int, layers: Sequence[TargetLayer], more: bool) -> None:
        dense = self.plan.propagate == "dense"
        watched: dict[int, _Watched] = {}
        if layers:
            groups = self.groups(index, layers)
            watched = self.timed("observe", lambda: self._watched(index, groups, dense and more))
            self.timed("compress", lambda: self._compress(layers, watched))
        if more and not (dense and layers):
            self.timed("propagate", lambda: self.propagate(index, dense=not layers))

    def _watched(self, index: int, groups: InputGroups, keep: bool) -> dict[int, _Watched]:
        """Collect statistics of every distinct input; by ``id(layer)`` of the layers."""

        def start() -> list[_Watched]:
            return [self._empty(group[0]) for group in groups.groups]

        pair = _pair if self.corrects else None
        watched = self.observe(index, groups, start, _listen, keep, pair)
        found = {}
        for group, seen in zip(groups.groups, watched, strict=True):
            if not seen.finite or (seen.stats is not None and not seen.stats.is_finite()):
                raise NumericalError(
                    group[0].name,
                    "calibration input",
                    "NaN or Inf in the activations",
                    "try dtype=float32 or bfloat16",
                )
            found |= {id(layer): seen for layer in group}
        pairs = [(g[0], w.stats) for g, w in zip(groups.groups, watched, strict=True)]
        self.borrowed |= fill_up([(layer, stats) for layer, stats in pairs if stats is not None])
        return found

    def _empty(self, layer: TargetLayer) -> _Watched:
        kind = self.plan.method.statistic
        width, device = layer.shape[1], layer.parameter.device
        stats = None
        if kind != "none":
            stats = STATISTICS[kind].empty(width, device)
            if self.plan.method.uses_heldout:
                stats.heldout = STATISTICS[kind].empty(width, device)
        counts = [sum(c.tokens for c in self.chunks if c.heldout == h) for h in (False, True)]
        if layer.expert is not None:
            # Two experts a token is usual; a busier expert keeps more rows than the limit.
            share = max(1, layer.parameter.shape[0] // 2)
            counts = [-(-count // share) for count in counts]
        # The two models send tokens to experts of their own.
        corrected = self.corrects and layer.expert is None and layer.block != HEAD
        cross = torch.zeros(width, width, device=device) if corrected else None
        used, out = (TokenSample(count, ERROR_TOKENS) for count in counts)
        return _Watched(stats, used, out, cross=cross)

    def _compress(self, layers: Sequence[TargetLayer], watched: dict[int, _Watched]) -> None:
        for layer in layers:
            start = time.perf_counter()
            before = layer.read()
            seen = watched.get(id(layer))
            stats = seen.stats if seen else None
            method = self.plan.method_of(layer)
            if stats is not None and not stats.tokens:
                self.unseen.append(layer.name)
            if method.does_nothing:
                result = LayerResult(before)
            else:
                target = before if seen is None else self._target(layer, before, seen)
                result = self._solve(method, layer, target, stats)
                layer.write(result.weight)
                if result.bias is not None:
                    layer.add_to_bias(result.bias)
            if result.grid is not None:
                self.result.grids[layer.name] = result.grid
            self.result.rows.append(self._row(layer, before, result, seen, start))

    def _target(self, layer: TargetLayer, before: Tensor, seen: _Watched) -> Tensor:
        """Return the weight that brings the outputs nearest to those of the dense model."""
        if seen.cross is None:
            return before
        if seen.shift is None:
            with named(layer.name):
                seen.shift = input_shift(seen.stats, seen.cross)
        return before + self.plan.method.correction * (before @ seen.shift.t())

    def _solve(
        self, method: Method, layer: TargetLayer, before: Tensor, stats: LayerStats | None
    ) -> LayerResult:
        with named(layer.name):
            result = method.compress(before, stats, layer.parameter.dtype)
        found = [result.weight] if result.bias is None else [result.weight, result.bias]
        if not all(bool(x.to(layer.parameter.dtype).isfinite().all()) for x in found):
            raise NumericalError(layer.name, "result", "NaN or Inf after compression", "raise damp")
        asked = getattr(method, "damp", None)
        if result.damp is not None and asked is not None and result.damp > asked:
            self.result.warnings.append(
                f"{layer.name}: damp raised from {asked:g} to {result.damp:g} to factor the Gram "
                "matrix"
            )
        self.result.warnings += [f"{layer.name}: {note}" for note in result.notes]
        return result

    def _row(
        self,
        layer: TargetLayer,
        before: Tensor,
        result: LayerResult,
        seen: _Watched | None,
        start: float,
    ) -> LayerRow:
        after = layer.read()
        return LayerRow(
            name=layer.name,
            shape=layer.shape,
            removed=float((after == 0).sum()) / max(1, after.numel()),
            bits=result.grid.bits if result.grid is not None else None,
            error_calibration=relative_error(before, after, seen.used.rows()) if seen else None,
            error_heldout=relative_error(before, after, seen.heldout.rows()) if seen else None,
            damp=result.damp,
            tokens=seen.used.seen if seen else None,
            seconds=round(time.perf_counter() - start, 4),
            asked=self._asked(layer),
            borrowed=self.borrowed.get(layer.name),
        )

    def _asked(self, layer: TargetLayer) -> str | float | None:
        options = self.plan.method_of(layer).options() if layer.name in self.plan.methods else {}
        pattern, share = options.get("pattern"), options.get("sparsity")
        return share if pattern in (None, "unstructured") else pattern

    def _head(self, layer: TargetLayer) -> None:
        watched: dict[int, _Watched] = {}
        if self.chunks:
            seen = self._empty(layer)
            for chunk in self.chunks:
                received = rows(chunk, self.recorder.after_blocks(chunk, layer.module))
                _listen([seen], chunk, 0, received, chunk.owners())
            watched = {id(layer): seen}
        self._compress([layer], watched)


def _listen(
    watched: Sequence[_Watched], chunk: Chunk, number: int, rows: Tensor, owners: Tensor
) -> None:
    seen = watched[number]
    if chunk.heldout or seen.stats is None:
        seen.finite = seen.finite and bool(rows.isfinite().all())
    weights = None if chunk.weights is None else chunk.weights[owners]
    if chunk.heldout:
        seen.heldout.update(rows)
        if seen.stats is not None and seen.stats.heldout is not None:
            seen.stats.heldout.update(rows, weights, owners)
        return
    seen.used.update(rows)
    if seen.stats is not None:
        seen.stats.update(rows, weights, owners)


def _pair(
    watched: Sequence[_Watched], chunk: Chunk, number: int, rows: Tensor, dense: Tensor
) -> None:
    seen = watched[number]
    if seen.cross is None or chunk.heldout:
        return
    rows = rows.float()
    difference = dense.float() - rows
    if chunk.weights is not None:
        difference *= chunk.weights[chunk.owners()].to(difference)[:, None]
    seen.cross.addmm_(rows.t(), difference)
