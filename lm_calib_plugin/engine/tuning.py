"""A decoder block as a function of its weights, differentiable, for roundings that learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lm_calib_plugin.engine.batches import BlockCall, Chunk
from lm_calib_plugin.engine.capture import _mapped, called, forward_hidden, replay
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.placement import execution_device

# Largest relative difference of one row computed alone: short dtypes round differently by shape.
CLOSE = 0.02


class BlockTuning:
    """One block, its recorded inputs and its dense outputs.

    Implements :class:`~lm_calib_plugin.quantization.parts.BlockProblem`. The block itself is not
    touched: other weights take part in a functional call, and its parameters see no gradient.

    A sequence is a row of a chunk, where the recorded arguments can be cut by rows: those tensors
    whose first dimension is that of the chunk. This is tried out with one row of every chunk;
    where it does not reproduce the row, the whole chunk counts as one sequence.

    Parameters
    ----------
    block
        The block with its dense weights.
    layers
        The layers of this block whose weights change.
    chunks
        Their ``hidden`` are the inputs of the block; calibration and held-out ones are kept apart.
    index
        Number of the block, and so of the recorded calls.
    targets
        What the outputs are compared with, ``[batch, length, hidden]`` for each chunk; None: the
        outputs of the block as it is, on the same inputs.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: Sequence[TargetLayer],
        chunks: Sequence[Chunk],
        index: int,
        targets: Sequence[Tensor] | None = None,
    ) -> None:
        self.block, self.layers, self.chunks, self.index = block, list(layers), chunks, index
        self.names = {id(p): name for name, p in block.named_parameters()}
        for layer in layers:
            if id(layer.parameter) not in self.names:
                raise ValueError(f"{layer.name} is not in block {index}")
        self.weights = {layer.name: layer.read() for layer in layers}
        with torch.no_grad():
            # They wait where the inputs do.
            dense = [
                replay(block, c.calls[index], _hidden(c)).to(_hidden(c).device) for c in chunks
            ]
            self.targets = dense if targets is None else list(targets)
            whole = [not self._cuts(number, dense[number]) for number in range(len(chunks))]
        # For each kind of sequence, the chunk and the row; None: all rows.
        self._places: dict[bool, list[tuple[int, int | None]]] = {False: [], True: []}
        for number, chunk in enumerate(chunks):
            rows: Iterable[int | None] = (None,) if whole[number] else range(chunk.rows)
            self._places[chunk.heldout] += [(number, row) for row in rows]
        self.sequences, self.heldout = (len(self._places[h]) for h in (False, True))

    def loss(
        self, weights: Mapping[str, Tensor], sequences: Sequence[int], heldout: bool = False
    ) -> Tensor:
        """Return the mean squared difference of the outputs from their targets, a float32 scalar.

        Parameters
        ----------
        weights
            One for each layer, ``[out, in]``; the loss is differentiable in them.
        sequences
            Indices below ``self.sequences`` (with ``heldout``: below ``self.heldout``).
        heldout
            Whether the sequences are those held out.

        Notes
        -----
        Every position that counts has the weight of its sequence; pads have none.
        """
        parameters = self._parameters(weights)
        rows: dict[int, list[int]] = {}
        for place in sequences:
            number, row = self._places[heldout][place]
            every = range(self.chunks[number].rows)
            rows.setdefault(number, []).extend(every if row is None else [row])
        total: Any = 0.0
        count: Any = 0.0
        for number, picked in rows.items():
            counts = _counts(self.chunks[number])[picked]
            output = self._output(number, picked, parameters)
            counts = counts.to(output.device)
            wanted = self.targets[number][picked].to(output.device)
            difference = output.float() - wanted.float()
            # A pad may hold anything, also what is not a number.
            difference = difference.masked_fill((counts == 0)[..., None], 0.0)
            total = total + (difference.square().mean(dim=-1) * counts).sum()
            count = count + counts.sum()
        loss: Tensor = total / count
        return loss

    def _parameters(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all parameters of the block, with the weights in the place of the layers'."""
        found = {name: p.detach() for name, p in self.block.named_parameters()}
        experts: dict[str, dict[int, Tensor]] = {}
        for layer in self.layers:
            name = self.names[id(layer.parameter)]
            weight = weights[layer.name].to(layer.parameter.dtype)
            weight = weight.t() if layer.transposed else weight
            if layer.expert is None:
                found[name] = weight
            else:
                experts.setdefault(name, {})[layer.expert] = weight
        for name, changed in experts.items():
            old = found[name]
            found[name] = torch.stack([changed.get(e, old[e]) for e in range(old.shape[0])])
        return found

    def _output(self, number: int, rows: list[int], parameters: dict[str, Tensor] | None) -> Tensor:
        """Return the output of the block for some rows of a chunk, ``[rows, length, hidden]``."""
        chunk = self.chunks[number]
        call, hidden = chunk.calls[self.index], _hidden(chunk)
        if rows != list(range(chunk.rows)):
            call, hidden = _cut(call, rows, chunk.rows), hidden[rows]
        if parameters is None:
            return replay(self.block, call, hidden)

        def block(*args: Any, **kwargs: Any) -> Tensor:
            return forward_hidden(functional_call(self.block, parameters, args, kwargs))

        return called(block, call, hidden.to(execution_device(self.block)))

    def _cuts(self, number: int, dense: Tensor) -> bool:
        """Tell whether the last row of a chunk, computed alone, is what it was among the others."""
        chunk = self.chunks[number]
        if chunk.rows == 1:
            return True
        last = chunk.rows - 1
        try:
            alone = self._output(number, [last], None)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError):
            return False
        if alone.shape[1:] != dense.shape[1:]:
            return False
        real = _counts(chunk)[last].to(alone.device) > 0
        alone, wanted = alone[0, real].float(), dense[last].to(alone.device)[real].float()
        return bool((alone - wanted).norm() <= CLOSE * wanted.norm())


def _hidden(chunk: Chunk) -> Tensor:
    assert chunk.hidden is not None
    return chunk.hidden


def _counts(chunk: Chunk) -> Tensor:
    """Return how often each position counts, ``[batch, length]``, float32."""
    counted = chunk.counted()
    counts = torch.ones_like(chunk.ids) if counted is None else counted.reshape(chunk.ids.shape)
    each = torch.ones(chunk.rows) if chunk.weights is None else chunk.weights.float()
    return counts.float() * each[:, None].to(counts.device)


def _cut(call: BlockCall, rows: list[int], batch: int) -> BlockCall:
    """Return a call with the rows of every tensor that has one for each sequence."""

    def cut(tensor: Tensor) -> Tensor:
        whole = tensor.dim() >= 2 and tensor.shape[0] == batch
        return tensor[rows] if whole else tensor

    args = tuple(_mapped(value, cut) for value in call.args)
    kwargs = {key: _mapped(value, cut) for key, value in call.kwargs.items()}
    return BlockCall(args, kwargs, call.position)
