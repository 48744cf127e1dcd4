"""How large the inputs of a layer get: per channel, and as a histogram over the whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from lm_calib_plugin.statistics.base import LayerStats
from lm_calib_plugin.statistics.gram import Gram
from lm_calib_plugin.statistics.moments import Moments

# Bins are cut at the leading bits of float32 numbers: powers of two, each split evenly.
LOWEST, HIGHEST, SPLIT_BITS = -30, 20, 6
_SHIFT = 23 - SPLIT_BITS
_OFFSET = (LOWEST + 127) << SPLIT_BITS
_INNER = (HIGHEST - LOWEST) << SPLIT_BITS
BINS = _INNER + 3


class Ranges(Moments):
    """Largest and mean absolute values of every channel, and a histogram of all absolute values.

    The histogram has one bin for zero, one for what lies between zero and ``2^-30``, 64 bins for
    every doubling up to ``2^20`` (no wider than 1/64 of what they hold) and one for all above. The
    first token of every sequence is counted apart: massive activations sit mostly there.

    ``mass`` is the sum of the weights of the rows (their number when none are given). Maxima do
    not depend on weights, as long as they are positive.
    """

    numbers = ("tokens", "mass")
    # Not added up over rows, and so not grown by their weights.
    peaks = ("peak_first", "peak_later")

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.sum_absolute = torch.zeros_like(self.sum_squares)
        self.peak_first = torch.zeros(in_features, device=self.device)
        self.peak_later = torch.zeros_like(self.peak_first)
        # Counts, [BINS], of all rows and of first tokens; None when they are not known.
        self.histogram: Tensor | None = torch.zeros(BINS, dtype=torch.float64, device=self.device)
        self.histogram_first: Tensor | None = torch.zeros_like(self.histogram)
        self.mass = 0.0

    def update(
        self, x: Tensor, weights: Tensor | None = None, owners: Tensor | None = None
    ) -> None:
        """Add input rows ``x``, ``[tokens, in]``; a sequence comes whole in one call.

        ``owners`` tells the sequence of each row, whose first row is its first token; without it
        all rows are one sequence.
        """
        super().update(x, weights, owners)
        if not x.shape[0]:
            return
        size = x.detach().to(self.device, torch.float32).abs()
        mass = torch.ones(len(size), device=self.device)
        mass = mass if weights is None else weights.to(mass)
        self.mass += float(mass.sum(dtype=torch.float64))
        self.sum_absolute += (size * mass[:, None]).sum(0, dtype=torch.float64)
        first = _first_rows(owners, len(size), size.device)
        self._count(size, mass, first)
        if weights is not None:
            size[mass <= 0] = 0
        self.peak_first = torch.maximum(self.peak_first, size[first].amax(0))
        size[first] = 0
        self.peak_later = torch.maximum(self.peak_later, size.amax(0))

    def _count(self, size: Tensor, mass: Tensor, first: Tensor) -> None:
        if self.histogram is None or self.histogram_first is None:
            raise ValueError("rows can not be added to a histogram that is not known")
        # Rows of one weight are counted in whole numbers, whose sum does not depend on an order.
        for weight in mass.unique().tolist():
            alike = mass == weight
            self.histogram += weight * _counted(size if bool(alike.all()) else size[alike])
            self.histogram_first += weight * _counted(size[first[alike[first]]])

    def _add(self, x: Tensor) -> None:
        self.sum_squares += x.square().sum(dim=0, dtype=torch.float64)

    def _join(self, other: Self) -> None:
        super()._join(other)
        self.sum_absolute += other.sum_absolute.to(self.device)
        self.mass += other.mass
        for name in self.peaks:
            both = torch.maximum(getattr(self, name), getattr(other, name).to(self.device))
            setattr(self, name, both)
        for name in ("histogram", "histogram_first"):
            own, others = getattr(self, name), getattr(other, name)
            known = own is not None and others is not None
            setattr(self, name, own + others.to(self.device) if known else None)

    def scaled(self, factor: float) -> Self:
        """Return the statistic as if every row had counted ``factor`` times."""
        made = super().scaled(factor)
        for name in self.peaks if factor > 0 else ():
            setattr(made, name, getattr(self, name).clone())
        return made

    def _divide(self, factors: Tensor) -> None:
        super()._divide(factors)
        self.sum_absolute = self.sum_absolute / factors.double()
        for name in self.peaks:
            setattr(self, name, getattr(self, name) / factors.to(self.peak_first))
        self.histogram = self.histogram_first = None

    def mean_abs(self) -> Tensor:
        """Return the mean of ``|x|`` of each channel, ``[in]``, float32; ones if unseen."""
        if not self.tokens:
            return torch.ones(self.in_features, device=self.device)
        return (self.sum_absolute / max(self.mass, 1e-300)).float()

    def channel_max(self, first: bool = True) -> Tensor:
        """Return the largest ``|x|`` of each channel, ``[in]``, float32; ones if unseen.

        Without ``first``, the first token of every sequence does not count.
        """
        if not self.tokens:
            return torch.ones(self.in_features, device=self.device)
        return torch.maximum(self.peak_first, self.peak_later) if first else self.peak_later.clone()

    @property
    def limit(self) -> float:
        """Largest ``|x|`` of all; 1 if no token was seen."""
        return float(self.channel_max().max())

    @property
    def limit_without_first(self) -> float:
        """Largest ``|x|`` but for the first token of every sequence; 1 if no token was seen.

        0 when every sequence had one token only.
        """
        return float(self.channel_max(first=False).max())

    def bins(self, first: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Return lower and upper ends and counts of the bins that are not empty, float64.

        No bin reaches beyond the largest value seen. Without ``first``, the first token of every
        sequence does not count.

        Raises
        ------
        ValueError
            For the statistic of inputs that were divided channel by channel: the histogram of the
            quotients does not follow from that of the inputs.
        """
        if self.histogram is None or self.histogram_first is None:
            raise ValueError("the histogram of rescaled inputs is not known")
        counts = self.histogram if first else self.histogram - self.histogram_first
        # Weights that are no whole numbers can leave a rest where nothing should be.
        kept = counts > 1e-9 * max(self.mass, 1e-300)
        edges = _edges().to(counts.device)
        limit = self.limit if first else self.limit_without_first
        return edges[:-1][kept].clamp(max=limit), edges[1:][kept].clamp(max=limit), counts[kept]

    def quantile(self, q: float, first: bool = True) -> float:
        """Return the smallest value that at least a share ``q`` of all ``|x|`` does not exceed.

        Exact but for the width of a bin, within which values are taken to be spread evenly;
        ``q = 1`` gives the exact maximum. 1 if no token was seen.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"expected a share between 0 and 1, got {q}")
        low, high, counts = self.bins(first)
        if not len(counts):
            return 1.0
        if q == 1:
            return self.limit if first else self.limit_without_first
        total = counts.cumsum(0)
        wanted = q * float(total[-1])
        place = int(torch.searchsorted(total, wanted * (1 - 1e-12)))
        inside = (wanted - float(total[place] - counts[place])) / float(counts[place])
        start, end = float(low[place]), float(high[place])
        return start + min(max(inside, 0.0), 1.0) * (end - start)


class GramRanges(Gram):
    """The Gram matrix, and beside it the ranges of the same rows."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.ranges = Ranges(in_features, device)

    def update(
        self, x: Tensor, weights: Tensor | None = None, owners: Tensor | None = None
    ) -> None:
        """Add input rows; see :meth:`Ranges.update`."""
        super().update(x, weights, owners)
        self.ranges.update(x, weights, owners)

    def _join(self, other: Self) -> None:
        super()._join(other)
        self.ranges.merge(other.ranges)

    def _divide(self, factors: Tensor) -> None:
        super()._divide(factors)
        self.ranges = self.ranges.divided(factors)


def ranges_in(stats: LayerStats | None) -> Ranges:
    """Return the ranges that statistics hold.

    Raises
    ------
    ValueError
        When they hold none.
    """
    if isinstance(stats, GramRanges):
        return stats.ranges
    if not isinstance(stats, Ranges):
        raise ValueError("the ranges of the inputs are needed")
    return stats


def _first_rows(owners: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Return the number of the first row of every owner."""
    if owners is None:
        return torch.zeros(1, dtype=torch.long, device=device)
    whose = torch.unique(owners.to(device), return_inverse=True)[1]
    rows = torch.arange(count, device=device)
    found = torch.full((int(whose.max()) + 1,), count, dtype=torch.long, device=device)
    return found.scatter_reduce_(0, whose, rows, "amin")


def _counted(size: Tensor) -> Tensor:
    """Return how many of these absolute values, float32, lie in each bin; ``[BINS]``."""
    # The bits of positive floats are in the order of the numbers; the sign of zero is gone.
    place = (size.contiguous().view(torch.int32) >> _SHIFT) - _OFFSET
    # Place 1 is what lies below the lowest edge, the last one all from the highest edge on.
    place = place.clamp_(-1, _INNER).add_(2)
    place[size == 0] = 0
    return torch.bincount(place.reshape(-1), minlength=BINS)


def _edges() -> Tensor:
    """Return the ends of all bins, ``[BINS + 1]``, float64; the last is infinite."""
    steps = torch.arange(_INNER, dtype=torch.float64)
    split = 2**SPLIT_BITS
    octave = torch.div(steps, split, rounding_mode="floor")
    inner = torch.exp2(octave + LOWEST) * (1 + (steps - octave * split) / split)
    ends = torch.tensor([2.0**HIGHEST, float("inf")], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    return torch.cat([zero, inner, ends])
