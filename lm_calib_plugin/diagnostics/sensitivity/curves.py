"""What a curve of loss against size of noise says: its slope, and where it meets a loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

# Nats: beyond, a model is no longer disturbed but broken, and the curve bends towards a ceiling.
BROKEN = 1.0


@dataclass(frozen=True)
class Point:
    """One size of noise: stated, as it is in the stored weights, and what it costs (nats).

    The interval is over sequences, for the noise that was drawn; ``each`` are the increases of
    single seeds, empty where logits were no numbers.
    """

    size: float
    stored: float
    value: float
    low: float
    high: float
    each: tuple[float, ...]

    @property
    def resolved(self) -> bool:
        """Whether the loss is told from 0, over sequences and by every two seeds (one draw)."""
        pairs = [self.each[i : i + 2] for i in range(0, len(self.each), 2)]
        return self.low > 0 and all(sum(pair) > 0 for pair in pairs)

    @property
    def finite(self) -> bool:
        """Whether there is a loss at all."""
        return math.isfinite(self.value)

    def plain(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "size": self.size,
            "stored": self.stored,
            "increase": {"value": self.value, "low": self.low, "high": self.high},
            "seeds": list(self.each),
        }


@dataclass(frozen=True)
class Slope:
    """Exponent of ``loss ~ size ^ value``, and the sizes between which it was fitted."""

    value: float
    first: float
    last: float
    points: int


def slope_of(points: Sequence[Point]) -> Slope | None:
    """Fit log loss against log size, where the loss is resolved and at most 1 nat.

    Small noise makes a loss that grows with its square (slope 2) where the model stands at a
    minimum of its loss, and linearly (slope 1) where it does not. None for fewer than two points.
    """
    used = [p for p in points if p.finite and p.resolved and p.value <= BROKEN]
    if len(used) < 2:
        return None
    x, y = (np.log([getattr(p, name) for p in used]) for name in ("stored", "value"))
    return Slope(float(np.polyfit(x, y, 1)[0]), used[0].stored, used[-1].stored, len(used))


def size_at(points: Sequence[Point], loss: float) -> float | None:
    """Return the size at which the loss first reaches a value; None where no point is beyond it,
    or the smallest is already.

    Between two points, log size is linear in log loss (in the loss itself, where that of the
    smaller size is not above 0).
    """
    known = [p for p in points if p.finite]
    for left, right in itertools.pairwise(known):
        if not left.value <= loss <= right.value or left.value == right.value:
            continue
        if left.value > 0:
            share = math.log(loss / left.value) / math.log(right.value / left.value)
        else:
            share = (loss - left.value) / (right.value - left.value)
        return math.exp(math.log(left.stored) + share * math.log(right.stored / left.stored))
    return None


def of_seed(points: Sequence[Point], seed: int) -> list[Point]:
    """Return the points of one seed alone, without intervals."""
    return [
        replace(p, value=p.each[seed], low=p.each[seed], high=p.each[seed])
        for p in points
        if p.finite
    ]


def where_not(points: Sequence[Point], loss: float) -> str:
    """Return in words where a size is that :func:`size_at` did not find."""
    known = [p for p in points if p.finite]
    if known and known[0].value > loss:
        return f"below {known[0].stored:.3g}"
    return f"above {known[-1].stored:.3g}" if known else "unknown"
