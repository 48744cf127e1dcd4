"""Block by block: observe the inputs, compress the layers, pass the data on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.capture import Recorder, replay
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.layers import HEAD, TargetLayer
from lm_calib_plugin.engine.observe import InputGroups
from lm_calib_plugin.errors import CalibError, NumericalError
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.report import LayerRow
from lm_calib_plugin.statistics import STATISTICS, LayerStats, TokenSample
from lm_calib_plugin.statistics.sample import relative_error

ERROR_TOKENS = 512


@dataclass(frozen=True)
class Plan:
    """What to do: one method on a list of layers.

    ``propagate`` is ``compressed`` or ``dense``: which model's hidden states the next block sees.
    """

    method: Method
    layers: Sequence[TargetLayer]
    propagate: str = "compressed"


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
    """What is remembered of one distinct input."""

    stats: LayerStats | None
    used: TokenSample
    heldout: TokenSample
    finite: bool = True


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


class _Walk:
    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        chunks: list[Chunk],
        plan: Plan,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.model, self.blocks, self.chunks, self.plan = model, blocks, chunks, plan
        self.device, self.progress = device, progress
        self.recorder = Recorder(model, blocks, device)
        self.result = WalkResult(pads=sum(c.pads for c in chunks))
        self.probe: Chunk | None = None

    def run(self) -> WalkResult:
        by_block: dict[int, list[TargetLayer]] = {}
        for layer in self.plan.layers:
            by_block.setdefault(layer.block, []).append(layer)
        if self.chunks:
            self._timed("capture", self._capture)
        bar = tqdm(
            range(len(self.blocks)),
            desc=f"{type(self.plan.method).__name__.lower()} blocks",
            disable=not self.progress,
        )
        # After the last block that holds a target, data only matters for the head.
        last = len(self.blocks) if HEAD in by_block else max(by_block, default=-1)
        for index in bar:
            layers = by_block.get(index, [])
            if not self.chunks:
                self._timed("compress", lambda layers=layers: self._compress(layers, {}))
            elif index <= last:
                self._block(index, layers, more=index < last)
        if HEAD in by_block:
            self._timed("compress", lambda: self._head(by_block[HEAD][0]))
        return self.result

    # --- stages --------------------------------------------------------------------------

    def _capture(self) -> None:
        first = self.chunks[0]
        length = min(16, first.tokens // first.rows)
        probe = self.probe = Chunk(first.ids[:1, :length], None, heldout=True)
        self._until_it_fits(lambda: self.recorder.probe(probe))
        self._until_it_fits(self._record_all)

    def _record_all(self) -> None:
        for chunk in self.chunks:
            self.recorder.record(chunk)

    def _block(self, index: int, layers: Sequence[TargetLayer], more: bool) -> None:
        block = self.blocks.modules[index]
        dense = self.plan.propagate == "dense"
        watched: dict[int, _Watched] = {}
        if layers:
            assert self.probe is not None
            assert self.probe.hidden is not None
            probe = block, layers, self.probe.calls[index], self.probe.hidden
            groups = self._until_it_fits(lambda: InputGroups(*probe))
            watched = self._timed("observe", lambda: self._observe(index, groups, dense and more))
            self._timed("compress", lambda: self._compress(layers, watched))
        if more and not (dense and layers):
            self._timed("propagate", lambda: self._propagate(index, block))

    def _observe(self, index: int, groups: InputGroups, keep: bool) -> dict[int, _Watched]:
        """Collect statistics of every distinct input; by ``id(layer)`` of the layers."""

        def once() -> tuple[list[_Watched], list[Tensor | None]]:
            # Partial sums of a pass that failed are thrown away: nothing is ever counted twice.
            watched = [self._empty(group[0]) for group in groups.groups]
            outputs = [
                groups.watch(chunk, index, _listener(watched, chunk.heldout), whole=keep)
                for chunk in self.chunks
            ]
            return watched, outputs

        watched, outputs = self._until_it_fits(once)
        if keep:
            for chunk, hidden in zip(self.chunks, outputs, strict=True):
                chunk.hidden = hidden
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
        return found

    def _empty(self, layer: TargetLayer) -> _Watched:
        kind = self.plan.method.statistic
        width, device = layer.shape[1], layer.parameter.device
        stats = STATISTICS[kind].empty(width, device) if kind != "none" else None
        used = sum(c.tokens for c in self.chunks if not c.heldout)
        out = sum(c.tokens for c in self.chunks if c.heldout)
        if layer.expert is not None:
            # Two experts a token is usual; a busier expert keeps more rows than the limit.
            share = max(1, layer.parameter.shape[0] // 2)
            used, out = -(-used // share), -(-out // share)
        return _Watched(stats, TokenSample(used, ERROR_TOKENS), TokenSample(out, ERROR_TOKENS))

    def _propagate(self, index: int, block: nn.Module) -> None:
        for chunk in self.chunks:
            chunk.done = False

        def rest() -> None:
            for chunk in [c for c in self.chunks if not c.done]:
                assert chunk.hidden is not None
                chunk.hidden = replay(block, chunk.calls[index], chunk.hidden)
                chunk.done = True

        self._until_it_fits(rest)

    def _compress(self, layers: Sequence[TargetLayer], watched: dict[int, _Watched]) -> None:
        for layer in layers:
            start = time.perf_counter()
            before = layer.read()
            seen = watched.get(id(layer))
            stats = seen.stats if seen else None
            method = self.plan.method
            if stats is not None and not stats.tokens:
                self.result.warnings.append(
                    f"{layer.name} saw no calibration token: treated as if all its inputs were "
                    "equally large"
                )
            if method.does_nothing:
                result = LayerResult(before)
            else:
                result = self._solve(layer, before, stats)
                layer.write(result.weight)
            if result.grid is not None:
                self.result.grids[layer.name] = result.grid
            self.result.rows.append(self._row(layer, before, result, seen, start))

    def _solve(self, layer: TargetLayer, before: Tensor, stats: LayerStats | None) -> LayerResult:
        method = self.plan.method
        try:
            result = method.compress(before, stats, layer.parameter.dtype)
        except NumericalError as error:
            raise NumericalError(layer.name, error.stage, error.what, error.fix) from None
        if not bool(result.weight.to(layer.parameter.dtype).isfinite().all()):
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
        )

    def _head(self, layer: TargetLayer) -> None:
        watched: dict[int, _Watched] = {}
        if self.chunks:
            seen = self._empty(layer)
            listen = [_listener([seen], False), _listener([seen], True)]
            for chunk in self.chunks:
                x = self.recorder.after_blocks(chunk, layer.module)
                rows = x.reshape(-1, x.shape[-1])
                if chunk.mask is not None:
                    rows = rows[chunk.mask.bool().reshape(-1).to(rows.device)]
                listen[chunk.heldout](0, rows)
            watched = {id(layer): seen}
        self._compress([layer], watched)

    # --- helpers -------------------------------------------------------------------------

    def _until_it_fits(self, work: Callable[[], Any]) -> Any:
        """Repeat ``work`` with smaller chunks until it does not run out of memory."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                reason = str(error)
            # Outside the handler: there the traceback would keep the activations alive.
            self._halve(reason)

    def _halve(self, reason: str) -> None:
        """Make every chunk half as large, or say what to change when that is not possible."""
        self.recorder.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if all(chunk.rows == 1 for chunk in self.chunks):
            raise CalibError(
                f"out of memory with one sequence at a time ({reason}). Use a smaller seqlen, a "
                "model dtype of 16 bits, or a device with more memory."
            )
        size = max(chunk.rows for chunk in self.chunks) // 2
        smaller: list[Chunk] = []
        for chunk in self.chunks:
            parts = chunk.halves() if chunk.rows > 1 else [chunk]
            for part in parts:
                if part is not chunk and chunk.calls:
                    self.recorder.record(part)
                smaller.append(part)
        self.chunks[:] = smaller
        self.result.warnings.append(f"out of memory: chunks reduced to {size} sequences")

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return work()
        finally:
            self._synchronize()
            spent = time.perf_counter() - start
            self.result.seconds[stage] = self.result.seconds.get(stage, 0.0) + spent

    def _synchronize(self) -> None:
        for device in {p.device for p in self.model.parameters() if p.device.type == "cuda"}:
            torch.cuda.synchronize(device)


def _listener(watched: Sequence[_Watched], heldout: bool) -> Callable[[int, Tensor], None]:
    def listen(number: int, rows: Tensor) -> None:
        seen = watched[number]
        if heldout or seen.stats is None:
            seen.finite = seen.finite and bool(rows.isfinite().all())
        if heldout:
            seen.heldout.update(rows)
            return
        seen.used.update(rows)
        if seen.stats is not None:
            seen.stats.update(rows)

    return listen
