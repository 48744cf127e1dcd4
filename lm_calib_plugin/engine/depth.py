"""Rank decoder blocks, or their attention or MLP, by what the model is without each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.capture import replay
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.passes import BlockPass
from lm_calib_plugin.engine.rows import last_rows, row_weights, rows
from lm_calib_plugin.engine.sublayers import ATTENTION, MLP, Sublayer, find_sublayers, without
from lm_calib_plugin.errors import NumericalError

BLOCK = "block"


class DepthPass(BlockPass):
    """Sequences on their way through the blocks, of which some may be left out.

    Parameters
    ----------
    model, blocks, chunks, device
        As for :class:`~lm_calib_plugin.engine.passes.BlockPass`.
    kind
        ``block``, ``attention`` or ``mlp``: what is ranked and left out.
    """

    may_wait_on_host = False

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        chunks: list[Chunk],
        device: torch.device,
        kind: str,
        progress: bool,
    ) -> None:
        super().__init__(model, blocks, chunks, device)
        self.kind, self.progress = kind, progress
        self.sublayers: list[Sublayer] = []
        self.mlps: list[Sublayer] = []

    def begin(self) -> None:
        """Record the calls of all blocks and find the sub-layers."""
        self.timed("capture", self.capture)
        if self.kind != BLOCK:
            assert self.probe is not None
            assert self.probe.hidden is not None
            found = find_sublayers(self.blocks, self.probe.calls, self.probe.hidden)
            self.sublayers, self.mlps = found[self.kind], found[MLP]

    def again(self) -> None:
        """Start anew at the first block, with the model as it is now."""
        for chunk in self.chunks:
            chunk.hidden, chunk.calls, chunk.done = None, [], False
        self.recorder.forget()
        self.timed("capture", self.capture)

    def through(self) -> None:
        """Pass all chunks through all blocks."""
        for index in range(len(self.blocks)):
            self.propagate(index)

    def name(self, index: int) -> str:
        """Return the name of what is ranked in block ``index``."""
        return self.sublayers[index].name if self.sublayers else f"{self.blocks.path}.{index}"

    def output(self, index: int, chunk: Chunk, hidden: Tensor, gone: bool = False) -> Tensor:
        """Return what block ``index``, or with ``gone`` the rest of it, makes of ``hidden``."""
        block, call = self.blocks.modules[index], chunk.calls[index]
        if not gone:
            return replay(block, call, hidden)
        if self.kind == BLOCK:
            return hidden
        with without(self.sublayers[index]):
            return replay(block, call, hidden)

    def each(
        self,
        index: int,
        start: Callable[[], Any],
        look: Callable[[Any, Chunk, Tensor, Tensor], None],
        keep: bool = True,
    ) -> Any:
        """Run one block on all chunks; ``look`` sees state, chunk, input and output of each.

        ``keep``: the outputs become the hidden states.
        """

        def once() -> tuple[Any, list[Tensor]]:
            state, outputs = start(), []
            for chunk in self.chunks:
                assert chunk.hidden is not None
                outputs.append(self.output(index, chunk, chunk.hidden))
                look(state, chunk, chunk.hidden, outputs[-1])
            return state, outputs

        state, outputs = self.until_it_fits(once)
        if keep:
            for chunk, hidden in zip(self.chunks, outputs, strict=True):
                chunk.hidden = hidden
        return state

    # --- ranking -------------------------------------------------------------------------

    def distances(self, distance: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
        """Return the mean over calibration tokens of how far every part moves the hidden states."""
        values = []

        def look(state: list[float], chunk: Chunk, before: Tensor, after: Tensor) -> None:
            if chunk.heldout:
                return
            if self.kind != BLOCK:
                # The stream with and without the sub-layer: of an MLP at the end of the block, of
                # attention before the MLP has added its own.
                middle = self._without_mlp(index, chunk, before)
                before, after = (before, middle) if self.kind == ATTENTION else (middle, after)
            found = distance(rows(chunk, before), rows(chunk, after)).double()
            weights = row_weights(chunk, found)
            state[0] += float((found * weights).sum())
            state[1] += float(weights.sum())

        for index in self._bar("ranking"):
            total, count = self.each(index, lambda: [0.0, 0.0], look)
            values.append(self._finite(index, total / max(count, 1.0)))
        return values

    def _without_mlp(self, index: int, chunk: Chunk, before: Tensor) -> Tensor:
        with without(self.mlps[index]):
            return replay(self.blocks.modules[index], chunk.calls[index], before)

    def spans(self, distance: Callable[[Tensor, Tensor], Tensor], span: int) -> list[float]:
        """Return for every start the mean distance over ``span`` blocks, on last tokens."""
        states: list[Tensor] = []
        weights: list[Tensor] = []

        def look(state: list[list[Tensor]], chunk: Chunk, before: Tensor, after: Tensor) -> None:
            if not chunk.heldout:
                for kept, hidden in zip(state, (before, after), strict=True):
                    kept.append(last_rows(chunk, hidden).cpu())

        for index in self._bar("ranking"):
            before, after = self.each(index, lambda: [[], []], look)
            states += [torch.cat(before)] if index == 0 else []
            states.append(torch.cat(after))
        for chunk in self.chunks:
            if not chunk.heldout:
                own = chunk.weights
                weights.append(torch.ones(chunk.rows) if own is None else own)
        share = torch.cat(weights).double()
        share /= share.sum()
        return [
            self._finite(
                start, float(distance(states[start], states[start + span]) @ share.float())
            )
            for start in range(len(states) - span)
        ]

    def losses(self, candidates: Sequence[int], gone: Sequence[int]) -> tuple[float, list[float]]:
        """Return the loss without ``gone``, and that without each candidate beside.

        Every sequence goes once through the blocks; what follows a candidate is run again from
        its input. The loss is the mean over calibration tokens of ``-log p(next token)``.
        """
        totals = [0.0] * (len(candidates) + 1)
        count = 0.0
        for chunk in self.chunks:
            chunk.done = chunk.heldout

        def rest() -> None:
            nonlocal count
            for chunk in [c for c in self.chunks if not c.done]:
                sums, tokens = self._chunk_losses(chunk, candidates, set(gone))
                totals[:] = [a + b for a, b in zip(totals, sums, strict=True)]
                count += tokens
                chunk.done = True

        self.until_it_fits(rest)
        means = [total / max(count, 1.0) for total in totals]
        for index, value in zip(candidates, means[1:], strict=True):
            self._finite(index, value)
        return means[0], means[1:]

    def _chunk_losses(
        self, chunk: Chunk, candidates: Sequence[int], gone: set[int]
    ) -> tuple[list[float], float]:
        hidden = chunk.hidden
        assert hidden is not None
        found: dict[int, float] = {}
        depth = len(self.blocks)
        for index in range(depth):
            if index in candidates:
                branch = self.output(index, chunk, hidden, gone=True)
                for later in range(index + 1, depth):
                    branch = self.output(later, chunk, branch, later in gone)
                found[index] = self._loss(chunk, branch)[0]
            hidden = self.output(index, chunk, hidden, index in gone)
        dense, tokens = self._loss(chunk, hidden)
        return [dense, *(found[i] for i in candidates)], tokens

    def _loss(self, chunk: Chunk, hidden: Tensor) -> tuple[float, float]:
        """Return summed loss and number of predicted tokens, one sequence at a time."""
        total = count = 0.0
        for row in range(chunk.rows):
            length = chunk.ids.shape[1] if chunk.mask is None else int(chunk.mask[row].sum())
            ids = chunk.ids[row : row + 1, :length]
            logits = self.recorder.logits(Chunk(ids, None, False), hidden[row : row + 1, :length])
            first = 1 if chunk.skip_first else 0
            weight = 1.0 if chunk.weights is None else float(chunk.weights[row])
            predicted = logits[0, first:-1].float()
            targets = ids[0, first + 1 :].to(predicted.device)
            loss = nn.functional.cross_entropy(predicted, targets, reduction="none").double()
            total += weight * float(loss.sum())
            count += weight * targets.numel()
        return total, count

    def _bar(self, title: str) -> Any:
        return tqdm(range(len(self.blocks)), desc=f"{title}, blocks", disable=not self.progress)

    def _finite(self, index: int, value: float) -> float:
        if value != value or value in (float("inf"), float("-inf")):
            raise NumericalError(
                self.name(index), "ranking", "NaN or Inf", "try dtype=float32 or bfloat16"
            )
        return value
