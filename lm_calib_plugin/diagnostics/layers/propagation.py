"""How the error of each block travels through the model: teacher-forced and free, by depth.

*Teacher-forced*: each compressed block receives what the dense model has there, so that its error
is its own. *Free*: it receives what the compressed blocks before it give, so that errors pile up.
That what piles up is not what single layers tell is the point of arXiv 2509.23500; errors of
activations by depth are those of ApiQ (arXiv 2402.05147).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lm_calib_plugin import engine
from lm_calib_plugin.diagnostics.layers.depths import Depth, Propagation
from lm_calib_plugin.diagnostics.layers.measuring import Listener, Measured, Rounded, merged
from lm_calib_plugin.diagnostics.scoring import logits_of
from lm_calib_plugin.diagnostics.tokens import token_divergence
from lm_calib_plugin.engine import TargetLayer
from lm_calib_plugin.engine.batches import Chunk, make_chunks, token_budget
from lm_calib_plugin.engine.capture import Recorder, forward_hidden, replay
from lm_calib_plugin.engine.observe import InputGroups
from lm_calib_plugin.errors import CalibError, NumericalError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.placement import execution_device

# Numbers of one tensor of logits: 256 MiB in float32.
_LOGITS = 2**26


@dataclass
class Followed:
    """What was found on a text: errors by depth (None where not asked), and layer by layer."""

    propagation: Propagation | None
    layers: dict[str, Measured]


def follow(
    dense: Any,
    compressed: Any,
    sequences: Sequence[Tensor],
    layers: Sequence[str] = (),
    rounded: Mapping[str, Rounded] | None = None,
    *,
    propagate: bool = True,
    block_path: str | None = None,
    ignore: Sequence[str] = (),
    progress: bool = True,
    title: str = "propagation",
) -> Followed:
    """Send a text through two models, block by block, and compare.

    Memory does not grow with the number of sequences.

    Parameters
    ----------
    sequences
        Token ids, 1-D each.
    layers
        Names of the layers to look at.
    rounded
        How their inputs are rounded, by name.
    propagate
        Whether errors by depth are wanted, or only those of single layers.
    block_path, ignore
        As in the recipe.

    Raises
    ------
    NumericalError
        When hidden states or logits are not finite.
    CalibError
        When one sequence at a time does not fit in memory.
    """
    ours, theirs = (engine.find_blocks(model, block_path) for model in (dense, compressed))
    if len(ours) != len(theirs):
        end = _ends(dense, compressed, sequences, ours, theirs, progress)
        return Followed(end if propagate else None, {})
    pair = _Pair(dense, compressed, ours, theirs)
    names = set(layers)
    mine = [x for x in engine.find_layers(ours, ignore)[0] if x.name in names]
    twins = {x.name: x for x in engine.find_layers(theirs, ignore)[0]}
    found = Propagation([Depth() for _ in ours.modules])
    parts: list[dict[str, Measured]] = []
    waiting = _chunks(dense, sequences)
    blocks = len(waiting) * len(ours)
    with (
        left_as_found(dense),
        left_as_found(compressed),
        tqdm(total=blocks, desc=f"{title}, blocks", disable=not progress) as bar,
    ):
        pair.probe(waiting[0])
        groups = pair.groups(mine)
        while waiting:
            chunk = waiting.pop(0)
            try:
                part, measured = pair.through(chunk, groups, twins, rounded or {}, propagate)
            except torch.OutOfMemoryError as error:
                reason = str(error)
            else:
                found.add(part)
                parts.append(measured)
                bar.update(len(ours))
                continue
            # Outside the handler: there the traceback would keep the activations alive.
            waiting[:0] = _halves(chunk, reason)
    return Followed(found if propagate else None, merged(parts))


class _Pair:
    """Two models of as many blocks, block beside block."""

    def __init__(
        self, dense: Any, compressed: Any, ours: engine.Blocks, theirs: engine.Blocks
    ) -> None:
        self.models = dense, compressed
        self.blocks = ours.modules, theirs.modules
        self.path = ours.path
        self.recorders = [
            Recorder(model, blocks, execution_device(model.get_input_embeddings()))
            for model, blocks in ((dense, ours), (compressed, theirs))
        ]
        self.first: Chunk | None = None

    def probe(self, chunk: Chunk) -> None:
        """Learn what the blocks of both return, on a few tokens."""
        length = min(16, chunk.ids.shape[1] - chunk.pads // chunk.rows)
        for recorder in self.recorders:
            few = Chunk(chunk.ids[:1, :length], None, heldout=False)
            recorder.probe(few)
            self.first = self.first or few

    def groups(self, layers: Sequence[TargetLayer]) -> list[InputGroups | None]:
        """Return the layers of each dense block by the input that they share."""
        assert self.first is not None
        assert self.first.hidden is not None
        found: list[InputGroups | None] = []
        for index, block in enumerate(self.blocks[0]):
            own = [layer for layer in layers if layer.block == index]
            call = self.first.calls[index]
            found.append(InputGroups(block, own, call, self.first.hidden) if own else None)
        return found

    def through(
        self,
        chunk: Chunk,
        groups: Sequence[InputGroups | None],
        twins: Mapping[str, TargetLayer],
        rounded: Mapping[str, Rounded],
        propagate: bool,
    ) -> tuple[Propagation, dict[str, Measured]]:
        """Send a chunk through both models."""
        ours, theirs = (Chunk(chunk.ids, chunk.mask, False, chunk.numbers) for _ in self.recorders)
        for recorder, own in zip(self.recorders, (ours, theirs), strict=True):
            recorder.forget()
            if propagate or own is ours:
                recorder.record(own)
        found = Propagation([Depth() for _ in groups])
        measured: dict[str, Measured] = {}
        for index, group in enumerate(groups):
            before = ours.hidden
            if group is None:
                assert before is not None
                ours.hidden = replay(self.blocks[0][index], ours.calls[index], before)
            else:
                listener = Listener(group.groups, twins, rounded)
                ours.hidden = group.watch(ours, index, listener, whole=True)
                measured |= listener.found
            if propagate:
                assert before is not None
                block, call = self.blocks[1][index], theirs.calls[index]
                local = replay(block, call, before)
                assert theirs.hidden is not None
                # Where both receive the same, the free pass is the teacher-forced one.
                same = theirs.hidden.shape == before.shape and torch.equal(theirs.hidden, before)
                theirs.hidden = local if same else replay(block, call, theirs.hidden)
                assert ours.hidden is not None
                name = f"{self.path}.{index}"
                found.depths[index] = _depth(chunk, ours.hidden, local, theirs.hidden, name)
        if propagate:
            assert ours.hidden is not None
            assert theirs.hidden is not None
            pair = [
                recorder.logits(own, own.hidden)
                for recorder, own in zip(self.recorders, (ours, theirs), strict=True)
                if own.hidden is not None
            ]
            _predictions(found, chunk, pair[0], pair[1])
        return found, measured


def _depth(chunk: Chunk, dense: Tensor, local: Tensor, free: Tensor, name: str) -> Depth:
    """Return the squared norms of hidden states ``[batch, length, hidden]`` and their errors."""
    return Depth(
        _norms(chunk, dense, name),
        _norms(chunk, local.to(dense.device).float() - dense.float(), name),
        _norms(chunk, free.to(dense.device).float() - dense.float(), name),
    )


def _norms(chunk: Chunk, hidden: Tensor, name: str) -> Tensor:
    """Return the sum over tokens of squared norms: of all, and of all but the first of each row."""
    each = hidden.float().square().sum(-1, dtype=torch.float64).cpu()
    if chunk.mask is not None:
        each = torch.where(chunk.mask.bool(), each, 0.0)
    if not bool(each.isfinite().all()):
        raise NumericalError(name, "propagation", "NaN or Inf in the hidden states")
    return torch.stack([each.sum(), each[:, 1:].sum()])


def _predictions(into: Propagation, chunk: Chunk, dense: Tensor, compressed: Tensor) -> None:
    """Compare logits ``[batch, length, vocabulary]`` of a chunk."""
    for row in range(chunk.rows):
        length = chunk.ids.shape[1] if chunk.mask is None else int(chunk.mask[row].sum())
        p = dense[row, :length].float()
        q = compressed[row, :length].to(p.device).float()
        for which, one in (("dense", p), ("compressed", q)):
            if not bool(one.isfinite().all()):
                raise NumericalError(f"the {which} model", "propagation", "NaN or Inf in logits")
        into.logits += _around_mean(q - p)
        into.logit_energy += _around_mean(p)
        into.tokens.append(token_divergence(p[:-1], q[:-1], chunk.ids[row, 1:length]))


def _around_mean(values: Tensor) -> float:
    around = values - values.mean(-1, keepdim=True)
    return float(around.square().sum(dtype=torch.float64))


def _ends(
    dense: Any,
    compressed: Any,
    sequences: Sequence[Tensor],
    ours: engine.Blocks,
    theirs: engine.Blocks,
    progress: bool,
) -> Propagation:
    """Compare only what comes out of the last blocks: there are not as many of them."""
    found = Propagation([Depth()], aligned=False)
    last: list[Tensor] = []
    hooks = [
        blocks.modules[-1].register_forward_hook(
            lambda _m, _a, output: last.append(forward_hidden(output))
        )
        for blocks in (ours, theirs)
    ]
    try:
        with left_as_found(dense), left_as_found(compressed):
            bar = tqdm(sequences, desc="propagation, sequences", disable=not progress)
            for ids in bar:
                last.clear()
                chunk = Chunk(ids[None], None, heldout=False)
                pair = [
                    logits_of(model, chunk.ids, name)
                    for model, name in ((dense, "dense"), (compressed, "compressed"))
                ]
                found.depths[0].add(_depth(chunk, last[0], last[1], last[1], "the last block"))
                _predictions(found, chunk, pair[0], pair[1])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _chunks(model: Any, sequences: Sequence[Tensor]) -> list[Chunk]:
    embeddings = model.get_input_embeddings()
    length = max(len(s) for s in sequences)
    size = token_budget(execution_device(embeddings), length)
    size = max(1, min(size, _LOGITS // (int(embeddings.weight.shape[0]) * length)))
    return make_chunks(sequences, [], size, 0)


def _halves(chunk: Chunk, reason: str) -> list[Chunk]:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if chunk.rows == 1:
        raise CalibError(
            f"out of memory with one sequence at a time ({reason}). Use a smaller --text-length, a "
            "model dtype of 16 bits, or a device with more memory."
        )
    return chunk.halves()
