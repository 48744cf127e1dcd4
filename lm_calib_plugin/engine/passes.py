"""What every walk over the blocks shares: captured calls, memory that runs out, time, order."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine import residence
from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.capture import Recorder, replay
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.hidden import HiddenStates, waits_on_host
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.engine.observe import InputGroups
from lm_calib_plugin.engine.residence import is_offloaded
from lm_calib_plugin.errors import CalibError


class BlockPass:
    """Chunks of sequences on their way through the decoder blocks, one block at a time.

    Parameters
    ----------
    model, blocks
        The model, in inference mode, and its decoder blocks.
    chunks
        What goes through; replaced by smaller ones when memory is short.
    device
        Where the model takes its inputs.
    first
        The chunk that the few tokens of the check are taken from; default: the first of these.
    """

    # Whether the pass can do with hidden states that are not on the device of the blocks.
    may_wait_on_host = True

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        chunks: list[Chunk],
        device: torch.device,
        first: Chunk | None = None,
    ) -> None:
        self.model, self.blocks, self.chunks = model, blocks, chunks
        self.recorder = Recorder(model, blocks, device)
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.probe: Chunk | None = None
        self.first = first or (chunks[0] if chunks else None)
        self.halved = False
        self.hidden = HiddenStates(device)
        self.offloaded = is_offloaded(model)
        self.ahead = residence.Ahead()

    def capture(self) -> None:
        """Record the arguments of every block, after a check on a few tokens."""
        first = self.first
        assert first is not None
        length = min(16, first.ids.shape[1] - first.pads // first.rows)
        probe = self.probe = Chunk(first.ids[:1, :length], None, heldout=True)
        self.until_it_fits(lambda: self.recorder.probe(probe))
        assert probe.hidden is not None
        if self.may_wait_on_host:
            device = self.recorder.device
            waits = waits_on_host(self.model, self.chunks, probe.hidden, device)
            self.hidden = HiddenStates(device, waits)
        with residence.around(self.model, self.blocks.modules):
            self.until_it_fits(self._record_all)
        self.hidden.settle()

    def _record_all(self) -> None:
        for chunk in self.chunks:
            self.recorder.record(chunk)
            assert chunk.hidden is not None
            chunk.hidden = self.hidden.put(chunk.hidden)

    @contextlib.contextmanager
    def at_hand(self, index: int, changes: bool = False) -> Iterator[nn.Module]:
        """Have the weights of one block where it computes; with ``changes``, keep what they are
        at the end."""
        block, following = self.blocks.modules[index], index + 1
        stay = residence.resident(block, changes=changes, ahead=self.ahead)
        with self._moved() as moved, stay:
            moved()
            if following < len(self.blocks):
                self.ahead.fetch(self.blocks.modules[following])
            yield block
            moved()

    @contextlib.contextmanager
    def _moved(self) -> Iterator[Callable[[], None]]:
        """Count seconds before the first call, and after the second, as those of moving weights."""
        marks = [time.perf_counter()]
        yield lambda: marks.append(time.perf_counter())
        if self.offloaded and len(marks) == 3:
            spent = marks[1] - marks[0] + time.perf_counter() - marks[2]
            self.seconds["weights"] = self.seconds.get("weights", 0.0) + spent

    def groups(self, index: int, layers: Sequence[TargetLayer]) -> InputGroups:
        """Return the layers of a block by the input that they share."""
        assert self.probe is not None
        assert self.probe.hidden is not None
        probe = self.blocks.modules[index], layers, self.probe.calls[index], self.probe.hidden
        groups: InputGroups = self.until_it_fits(lambda: InputGroups(*probe))
        return groups

    def observe(
        self,
        index: int,
        groups: InputGroups,
        start: Callable[[], Any],
        listen: Callable[[Any, Chunk, int, Tensor, Tensor], None],
        keep: bool,
        pair: Callable[[Any, Chunk, int, Tensor, Tensor], None] | None = None,
        follow: bool = True,
    ) -> Any:
        """Run one block and hand what its layers receive to ``listen``.

        Parameters
        ----------
        index, groups
            The block, and its layers by input.
        start
            Makes an empty state; called again when a pass failed, so that nothing counts twice.
        listen
            Called with state, chunk, group number, rows ``[tokens, in]`` and their owners.
        keep
            Whether the outputs become the hidden states of the chunks.
        pair
            When given, the dense hidden states of the chunks go through the block, too, and it is
            called with state, chunk, group number, rows, and the rows of the dense model.
        follow
            Whether the dense hidden states become those behind the block.

        Returns
        -------
        The state after all chunks.
        """

        def once() -> tuple[Any, list[Tensor | None], list[Tensor | None]]:
            state = start()
            outputs: list[Tensor | None] = []
            followed: list[Tensor | None] = []
            for waiting, chunk in self.hidden.coming(self.chunks, dense=pair is not None):
                heard = _bound(listen, state, chunk)
                if pair is None or chunk.dense is None:
                    followed.append(waiting.dense)
                else:
                    with self.as_dense():
                        dense, output = _dense_inputs(groups, chunk, index)
                    followed.append(self._kept(output) if follow else waiting.dense)
                    heard = _both(heard, _bound(pair, state, chunk), dense)
                outputs.append(self._kept(groups.watch(chunk, index, heard, whole=keep)))
            self.hidden.settle()
            return state, outputs, followed

        state, outputs, followed = self.until_it_fits(once)
        for chunk, hidden in zip(self.chunks, outputs if keep else (), strict=keep):
            chunk.hidden = hidden
        for chunk, hidden in zip(self.chunks, followed, strict=pair is not None):
            chunk.dense = hidden
        return state

    def as_dense(self) -> contextlib.AbstractContextManager[None]:
        """Put the weights of the dense model back, for as long as the context lasts."""
        return contextlib.nullcontext()

    def propagate(self, index: int, dense: bool = False) -> None:
        """Pass the hidden states of all chunks through one block; with ``dense``, also those of
        the dense model, where they are followed."""
        block = self.blocks.modules[index]
        for chunk in self.chunks:
            chunk.done = False

        def rest() -> None:
            left = [c for c in self.chunks if not c.done]
            for chunk, here in self.hidden.coming(left, dense):
                assert here.hidden is not None
                hidden, followed = replay(block, chunk.calls[index], here.hidden), None
                if dense and here.dense is not None:
                    followed = replay(block, chunk.calls[index], here.dense)
                # Both at once: a pass that runs out of memory in between is repeated whole.
                chunk.hidden = self.hidden.put(hidden, chunk.hidden)
                if followed is not None:
                    chunk.dense = self.hidden.put(followed, chunk.dense)
                chunk.done = True
            self.hidden.settle()

        self.until_it_fits(rest)

    def until_it_fits(self, work: Callable[[], Any]) -> Any:
        """Repeat ``work`` with smaller chunks until it does not run out of memory."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                reason = str(error)
            # Outside the handler: there the traceback would keep the activations alive.
            self._halve(reason)

    def _kept(self, output: Tensor | None) -> Tensor | None:
        return None if output is None else self.hidden.put(output)

    def _halve(self, reason: str) -> None:
        """Make every chunk half as large, or say what to change when that is not possible."""
        self.recorder.forget()
        self.hidden.settle()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if all(chunk.rows == 1 for chunk in self.chunks):
            raise CalibError(
                f"out of memory with one sequence at a time ({reason}). Use a smaller seqlen, a "
                "model dtype of 16 bits, or a device with more memory."
            )
        self.halved = True
        size = max(chunk.rows for chunk in self.chunks) // 2
        smaller: list[Chunk] = []
        for chunk in self.chunks:
            parts = chunk.halves() if chunk.rows > 1 else [chunk]
            for part in parts:
                if part is not chunk and chunk.calls:
                    self.recorder.record(part)
                smaller.append(part)
        self.chunks[:] = smaller
        self.warnings.append(f"out of memory: chunks reduced to {size} sequences")

    def timed(self, stage: str, work: Callable[[], Any]) -> Any:
        """Return what ``work`` returns; its seconds are added to those of the stage."""
        start = time.perf_counter()
        try:
            return work()
        finally:
            self._synchronize()
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def _synchronize(self) -> None:
        devices = {p.device for p in self.model.parameters()} | {self.recorder.device}
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)


def _dense_inputs(
    groups: InputGroups, chunk: Chunk, index: int
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Return what the layers receive from the dense hidden states, and the output of the block."""
    found: dict[int, Tensor] = {}

    def take(number: int, rows: Tensor, _owners: Tensor) -> None:
        found[number] = rows

    output = groups.watch(dataclasses.replace(chunk, hidden=chunk.dense), index, take, whole=True)
    return found, output


def _both(
    heard: Callable[[int, Tensor, Tensor], None],
    pair: Callable[[int, Tensor, Tensor], None],
    dense: dict[int, Tensor],
) -> Callable[[int, Tensor, Tensor], None]:
    """Return a listener that hands rows on alone and beside those of the dense model."""

    def listen(number: int, rows: Tensor, owners: Tensor) -> None:
        heard(number, rows, owners)
        pair(number, rows, dense[number])

    return listen


def _bound(
    listen: Callable[[Any, Chunk, int, Tensor, Tensor], None], state: Any, chunk: Chunk
) -> Callable[[int, Tensor, Tensor], None]:
    return lambda number, rows, owners: listen(state, chunk, number, rows, owners)
