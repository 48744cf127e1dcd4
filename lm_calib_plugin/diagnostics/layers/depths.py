"""Errors of hidden states by depth, and what they come to at the end: sums, and what follows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lm_calib_plugin.diagnostics.tokens import TokenDivergence

# First tokens that make an error this many times smaller are worth a word, and a curve.
FIRST_TOKENS = 2.0


@dataclass
class Depth:
    """Squared norms behind one block, summed over tokens, ``[all, without first tokens]`` each.

    ``energy`` of the dense hidden states, ``local`` of the teacher-forced error, ``free`` of the
    free one.
    """

    energy: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    local: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    free: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def add(self, other: Depth) -> None:
        """Add the sums over other tokens."""
        self.energy = self.energy + other.energy
        self.local = self.local + other.local
        self.free = self.free + other.free

    def relative(self, which: str, rest: bool = False) -> float:
        """Return the relative squared error; with ``rest``, without first tokens."""
        energy = float(self.energy[int(rest)])
        return float(getattr(self, which)[int(rest)]) / energy if energy > 0 else 0.0


@dataclass
class Propagation:
    """What was found on a text.

    ``depths`` has one entry a block, in order; where blocks were taken out (``aligned`` False) only
    one, of the end. ``logits`` and ``logit_energy`` are squared norms of the difference of logits
    and of the dense logits, both around the mean of each token, as adding a constant to all logits
    changes nothing. ``tokens`` holds what became of predictions.
    """

    depths: list[Depth]
    aligned: bool = True
    logits: float = 0.0
    logit_energy: float = 0.0
    tokens: list[TokenDivergence] = field(default_factory=list)

    def add(self, other: Propagation) -> None:
        """Add what was found on other tokens."""
        for mine, theirs in zip(self.depths, other.depths, strict=True):
            mine.add(theirs)
        self.logits += other.logits
        self.logit_energy += other.logit_energy
        self.tokens += other.tokens

    def curve(self, which: str, rest: bool = False) -> list[float]:
        """Return the relative squared errors by depth: ``local``, ``free``."""
        return [depth.relative(which, rest) for depth in self.depths]

    def added(self, rest: bool = False) -> list[float]:
        """Return what the errors would be if those of the blocks just added up.

        Squared errors of the blocks before, and of each itself, over the energy of the hidden
        states there: the residual stream carries every error on.
        """
        total, found = 0.0, []
        for depth in self.depths:
            total += float(depth.local[int(rest)])
            energy = float(depth.energy[int(rest)])
            found.append(total / energy if energy > 0 else 0.0)
        return found

    def amplification(self) -> float | None:
        """Return the free error at the end over the sum of all local ones; None where that is 0."""
        local = sum(float(depth.local[0]) for depth in self.depths)
        if not self.aligned or not local > 0:
            return None
        return float(self.depths[-1].free[0]) / local

    def first_tokens(self) -> tuple[int, float] | None:
        """Return where first tokens hide most of the free error, and how many times.

        The number of the block, and the error without first tokens over that with them. Their
        hidden states are often far larger than all others, and change little.
        """
        pairs = zip(self.curve("free", rest=True), self.curve("free"), strict=True)
        found = [(rest / every, i) for i, (rest, every) in enumerate(pairs) if every > 0]
        if not found:
            return None
        times, place = max(found)
        return place, times

    def logit_error(self) -> float:
        """Return the relative squared error of the logits."""
        return self.logits / self.logit_energy if self.logit_energy > 0 else 0.0
