"""Chunks of calibration sequences: padded ids, masks, and the hidden states in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CPU_TOKENS, GPU_TOKENS = 4096, 16384


@dataclass
class BlockCall:
    """Everything that a block was called with, except the hidden states.

    ``position`` tells where the hidden states stood: an index of ``args`` or a keyword.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    position: int | str


@dataclass
class Chunk:
    """Sequences that go through the model together.

    ``ids`` and ``mask`` are ``[batch, length]`` on the CPU (``mask`` None without pads);
    ``hidden`` is ``[batch, length, hidden]``; ``calls`` has one entry a block. ``numbers`` are the
    places of the sequences in the set. ``dense`` are the hidden states of the dense model, where
    both are followed. ``weights`` (``[batch]``, None: all one) says how many times
    a token of each counts in the statistics, ``skip_first`` whether first tokens count at all.
    With ``places``, rows that are looked at are told by their place in the chunk, not by their
    sequence alone.
    """

    ids: Tensor
    mask: Tensor | None
    heldout: bool
    numbers: tuple[int, ...] = ()
    weights: Tensor | None = None
    skip_first: bool = False
    places: bool = False
    hidden: Tensor | None = None
    dense: Tensor | None = None
    calls: list[BlockCall] = field(default_factory=list)
    done: bool = False

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return int(self.ids.shape[0])

    @property
    def pads(self) -> int:
        """Number of pad positions, none of which is ever counted."""
        return 0 if self.mask is None else int((self.mask == 0).sum())

    @property
    def tokens(self) -> int:
        """Number of real tokens that count."""
        return self.ids.numel() - self.pads - (self.rows if self.skip_first else 0)

    def counted(self) -> Tensor | None:
        """Return which positions count, ``[batch * length]`` bool; None when all do."""
        if self.mask is None and not self.skip_first:
            return None
        counted = torch.ones_like(self.ids) if self.mask is None else self.mask.clone()
        if self.skip_first:
            counted[:, 0] = 0
        return counted.bool().reshape(-1)

    def owners(self) -> Tensor:
        """Return to which row of the chunk each counted position belongs, ``[tokens]``.

        With ``places``: its place, ``row * length + position``.
        """
        if self.places:
            rows = torch.arange(self.ids.numel())
        else:
            rows = torch.arange(self.rows).repeat_interleave(self.ids.shape[1])
        counted = self.counted()
        return rows if counted is None else rows[counted]

    def weights_of(self, owners: Tensor) -> Tensor | None:
        """Return how many times rows of these sequences count, ``[tokens]``; None: all once."""
        return None if self.weights is None else self.weights[owners]

    def halves(self) -> list[Chunk]:
        """Split in two (hidden states too); the calls have to be captured again."""
        middle = self.rows // 2
        return [self.part(rows) for rows in (slice(None, middle), slice(middle, None))]

    def part(self, rows: slice) -> Chunk:
        """Return some of the sequences, without their calls; hidden states are copied."""
        return Chunk(
            self.ids[rows],
            None if self.mask is None else self.mask[rows],
            self.heldout,
            self.numbers[rows],
            None if self.weights is None else self.weights[rows],
            self.skip_first,
            self.places,
            None if self.hidden is None else self.hidden[rows].clone(),
            None if self.dense is None else self.dense[rows].clone(),
            done=self.done,
        )


def heldout_indices(count: int, fraction: float) -> list[int]:
    """Return which of ``count`` sequences are held out: ``floor(count * fraction)``, spread.

    Evenly spread over the list, so that every source of a mix gives its share.
    """
    wanted = int(count * fraction + 1e-9)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def token_budget(device: torch.device, length: int) -> int:
    """Return the automatic number of sequences a chunk; a fixed rule, so runs repeat exactly."""
    budget = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    return max(1, budget // max(1, length))


def make_chunks(
    sequences: Sequence[Tensor],
    heldout: Sequence[int],
    size: int,
    pad_id: int,
    *,
    weights: Sequence[float] | None = None,
    skip_first: bool = False,
) -> list[Chunk]:
    """Group sequences into chunks of at most ``size``, statistics first, held-out ones last.

    Sequences are padded on the right to the longest of their chunk.
    """
    out = set(heldout)
    chunks = []
    for flag in (False, True):
        group = [i for i in range(len(sequences)) if (i in out) == flag]
        for start in range(0, len(group), size):
            numbers = tuple(group[start : start + size])
            part = [sequences[i] for i in numbers]
            length = max(len(s) for s in part)
            ids = torch.full((len(part), length), pad_id, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, sequence in enumerate(part):
                ids[row, : len(sequence)] = sequence
                mask[row, : len(sequence)] = 1
            counts = None if weights is None else torch.tensor([weights[i] for i in numbers])
            whole = bool(mask.all())
            chunks.append(Chunk(ids, None if whole else mask, flag, numbers, counts, skip_first))
    return chunks
