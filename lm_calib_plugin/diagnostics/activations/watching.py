"""Passes over the sequences, a chunk at a time: memory does not grow with the number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lm_calib_plugin import engine
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.diagnostics.activations.inputs import Grams, Input
from lm_calib_plugin.diagnostics.activations.seen import Seen
from lm_calib_plugin.diagnostics.activations.stream import Stream
from lm_calib_plugin.engine.batches import Chunk, make_chunks, token_budget
from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.placement import execution_device

# Rows that are kept of first tokens; of all others a number that depends on the model.
FIRST_ROWS = 32


@dataclass
class Both:
    """What was seen of one input: first tokens of sequences apart from all others.

    ``unplaced`` counts rows of which it is not known whether they are first tokens: they stand
    with the others.
    """

    first: Seen
    rest: Seen
    unplaced: int = 0

    def merge(self, other: Both) -> None:
        """Add what was seen elsewhere."""
        self.first.merge(other.first)
        self.rest.merge(other.rest)
        self.unplaced += other.unplaced

    def all(self) -> Seen:
        """Return both together, without sample and Gram matrix."""
        return Seen.merged(self.first, self.rest)


class Watch:
    """Visitor of the dense pass: adds each chunk's part to what is there when its block is done.

    So a pass that runs out of memory and is repeated counts once.

    Parameters
    ----------
    found
        Where everything is added up, by name of the input.
    inputs
        Filled with what the inputs are.
    grams
        Which Gram matrices are kept.
    sample
        Rows to keep of tokens that are no first ones.
    seed
        Of the sample.
    hidden_size
        Width of the residual stream.
    metrics
        Whether anything but Gram matrices is asked for.
    """

    def __init__(
        self,
        found: dict[str, Both],
        inputs: dict[str, Input],
        grams: Grams,
        sample: int,
        seed: int,
        hidden_size: int,
        metrics: bool = True,
    ) -> None:
        self.found, self.inputs, self.grams = found, inputs, grams
        self.sample, self.seed = sample, seed
        self.hidden_size, self.metrics = hidden_size, metrics
        self._ranks: tuple[tuple[int, ...], Tensor] = ((), torch.zeros(0))

    def wants(self, index: int) -> bool:
        """All blocks, or those that still need Gram matrices."""
        if self.metrics:
            return True
        if self.grams.full:
            return index in self.grams.taken
        return bool(self.grams.limit) and index not in self.grams.done

    def start(self, index: int, groups: Sequence[Sequence[engine.TargetLayer]]) -> list[Both]:
        """Return an empty part for every input of the block."""
        inputs = [Input.of(group, self.hidden_size) for group in groups]
        for one in inputs:
            self.inputs.setdefault(one.name, one)
        kept = self.grams.of_block(index, inputs)
        made = []
        for one, group in zip(inputs, groups, strict=True):
            place = one.width, group[0].device
            gram = one.name in kept
            made.append(Both(Seen(*place, FIRST_ROWS, gram), Seen(*place, self.sample, gram)))
        return made

    def listen(
        self, state: list[Both], chunk: Chunk, number: int, rows: Tensor, owners: Tensor
    ) -> None:
        """Add rows to first tokens and to the rest."""
        seen = state[number]
        if not len(rows):
            return
        length = chunk.ids.shape[1]
        if len(rows) != len(owners):
            # A module that gets part of the rows and does not say which.
            seen.unplaced += len(rows)
            generator = torch.Generator().manual_seed(derive_seed("unplaced", self.seed))
            ranks = torch.rand(len(rows), generator=generator, dtype=torch.float64)
            self._add(seen.rest, rows, torch.zeros(len(rows), dtype=torch.int64), ranks)
            return
        half = torch.tensor(chunk.numbers)[owners // length] % 2
        ranks = self._ranks_of(chunk)[owners]
        first = owners % length == 0
        for part, which in ((seen.first, first), (seen.rest, ~first)):
            chosen = rows[which.to(rows.device)]
            self._add(part, chosen, half[which], ranks[which])

    def _add(self, seen: Seen, rows: Tensor, half: Tensor, ranks: Tensor) -> None:
        if self.metrics:
            seen.update(rows, half, ranks)
        elif seen.gram is not None and len(rows):
            seen.gram.update(rows)

    def finish(
        self, index: int, groups: Sequence[Sequence[engine.TargetLayer]], state: list[Both]
    ) -> None:
        """Add the chunk's part to what is there."""
        for group, part in zip(groups, state, strict=True):
            one = Input.of(group, self.hidden_size)
            for seen in (part.first, part.rest):
                if not seen.is_finite():
                    raise NumericalError(
                        one.name,
                        "activations",
                        "NaN or Inf in the activations",
                        "try dtype=float32",
                    )
            mine = self.found.get(one.name)
            if mine is None:
                mine = self.found[one.name] = Both(
                    Seen(one.width, "cpu", FIRST_ROWS), Seen(one.width, "cpu", self.sample)
                )
            for own, seen in ((mine.first, part.first), (mine.rest, part.rest)):
                if own.gram is None and seen.gram is not None:
                    own.gram = type(seen.gram)(one.width)
            mine.merge(part)

    def _ranks_of(self, chunk: Chunk) -> Tensor:
        """Return a random number for every place of a chunk; it belongs to the token alone."""
        name = (*chunk.numbers, chunk.ids.shape[1])
        if self._ranks[0] != name:
            length = chunk.ids.shape[1]
            drawn = torch.zeros(len(chunk.numbers), length, dtype=torch.float64)
            for row, number in enumerate(chunk.numbers):
                own = length if chunk.mask is None else int(chunk.mask[row].sum())
                generator = torch.Generator()
                generator.manual_seed(derive_seed("activations", self.seed, number))
                drawn[row, :own] = torch.rand(own, generator=generator, dtype=torch.float64)
            self._ranks = name, drawn.reshape(-1)
        return self._ranks[1]


class WatchStream(Watch):
    """A watch that also looks at the residual stream."""

    residual: Stream

    def stream(self, index: int, chunk: Chunk) -> None:
        """Look at the hidden states before a block, or behind the last one."""
        self.residual.update(index, chunk)


def passed(
    model: nn.Module,
    blocks: engine.Blocks,
    layers: Sequence[engine.TargetLayer],
    calibration: CalibrationSet,
    watch: Watch,
    size: int | None = None,
    tick: Callable[[int], None] = lambda tokens: None,
) -> list[str]:
    """Run the sequences of a set through the model, unchanged, a chunk at a time.

    The hidden states of one chunk live at a time. Which layers share an input is asked of the
    beginning of the same sequence for every chunk.

    Parameters
    ----------
    size
        Sequences a chunk; None: about 4,096 tokens on a CPU, 16,384 on a GPU.
    tick
        Called with the number of tokens of every chunk that is done.

    Returns
    -------
    list of str
        Warnings.
    """
    device = execution_device(model.get_input_embeddings())  # type: ignore[operator]
    size = size or token_budget(device, max(map(len, calibration.sequences)))
    waiting = make_chunks(calibration.sequences, [], size, 0)
    warnings: list[str] = []
    ids = calibration.sequences[0][None, :16]
    while waiting:
        chunk = waiting.pop(0)
        chunk.places = True
        tokens, probe = chunk.tokens, Chunk(ids, None, False)
        work = engine.dense_pass(
            model, blocks, [chunk], layers, watch, device, progress=False, first=probe
        )
        warnings += work.warnings
        del chunk, work
        tick(tokens)
    return warnings
