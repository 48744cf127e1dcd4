"""What is kept of the inputs of a layer: sums, peaks and a sample, all of a size of its own.

Everything is additive: what was seen of two sets of tokens is the merge of what was seen of each,
so that neither chunks nor their order change it beyond the last bits of float64 sums. Nothing
grows with the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lm_calib_plugin.diagnostics.activations.histogram import BINS, counted
from lm_calib_plugin.statistics import Gram

# From which size on a value counts for LLM.int8 (arXiv 2208.07339).
LARGE = 6.0
# Values that are in work at once: a few tensors of 8 MiB.
_VALUES = 2**20
# A variance below this share of the mean square is what rounding leaves of equal values.
_NO_SPREAD = 1e-10


@dataclass
class Sample:
    """The rows whose tokens have the highest random ranks: the same whatever the chunks were.

    ``ranks`` ``[kept]`` (highest first) and ``rows`` ``[kept, in]``, at most ``limit``.
    """

    limit: int
    ranks: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    rows: Tensor | None = None

    def update(self, rows: Tensor, ranks: Tensor) -> None:
        """Take rows ``[tokens, in]`` with their ranks ``[tokens]``, as far as they are due."""
        if not self.limit or not len(rows):
            return
        best, which = ranks.topk(min(self.limit, len(ranks)))
        taken = rows[which.to(rows.device)].detach().float()
        if self.rows is not None:
            best, taken = torch.cat([self.ranks, best]), torch.cat([self.rows, taken])
            best, which = best.topk(min(self.limit, len(best)))
            taken = taken[which.to(taken.device)]
        self.ranks, self.rows = best, taken

    def merge(self, other: Sample, device: torch.device) -> None:
        """Take what another sample kept; it comes to this device."""
        if other.rows is not None:
            self.update(other.rows.to(device), other.ranks)


class Seen:
    """What was seen of input rows ``[tokens, width]``.

    Exact: ``tokens`` (``[2]``, their number), ``powers`` (``[2, 4, width]``: sums of the first four
    powers of every channel, float64), ``peaks`` (``[2, width]``: largest absolute value) - where
    the first dimension has two halves of the sequences, those with even and with odd numbers, so
    that a set can be compared with itself - and ``large`` (``[width]``: values of size 6 and more).
    Of single tokens: ``kurtosis`` and ``ratio``, each a sum over tokens and the number of tokens
    that have one. Binned: ``counts``, a signed histogram. ``sample`` keeps some rows, ``gram``
    (None: it was not asked for) sums ``x x^T`` in float32.
    """

    def __init__(
        self, width: int, device: torch.device | str = "cpu", sample: int = 0, gram: bool = False
    ) -> None:
        self.width = width
        self.tokens = torch.zeros(2, dtype=torch.int64)
        self.powers = torch.zeros(2, 4, width, dtype=torch.float64, device=device)
        self.peaks = torch.zeros(2, width, device=device)
        self.large = torch.zeros(width, dtype=torch.int64, device=device)
        self.counts = torch.zeros(2, BINS, dtype=torch.int64, device=device)
        self.kurtosis = torch.zeros(2, dtype=torch.float64, device=device)
        self.ratio = torch.zeros(2, dtype=torch.float64, device=device)
        self.sample = Sample(sample)
        self.gram = Gram(width, device) if gram else None

    def update(self, x: Tensor, half: Tensor, ranks: Tensor) -> None:
        """Add rows ``[tokens, width]``.

        Parameters
        ----------
        x
            Any float dtype.
        half
            0 or 1 for every row: the half of its sequence.
        ranks
            A random number for every row, that of its token.
        """
        self.sample.update(x, ranks)
        if self.gram is not None:
            self.gram.update(x)
        step = max(1, _VALUES // max(1, self.width))
        for start in range(0, len(x), step):
            part = x[start : start + step].detach().float()
            self._add(part, half[start : start + step].to(part.device))
        self.tokens += torch.bincount(half.cpu(), minlength=2)

    def _add(self, x: Tensor, half: Tensor) -> None:
        size = x.abs()
        for number in (0, 1):
            own = size[half == number]
            if len(own):
                self.peaks[number] = torch.maximum(self.peaks[number], own.amax(0))
        self.large += (size >= LARGE).sum(0)
        self.counts += counted(x)
        median = middle(size)
        has = median > 0
        self.ratio += _sum((size.amax(1) / median.where(has, median.new_ones(())))[has])
        self._moments(x.double(), half)

    def _moments(self, x: Tensor, half: Tensor) -> None:
        """Add powers; sums over tokens as one product, with a row of ones for each half."""
        which = torch.stack([half == 0, half == 1]).to(x)
        squares = x * x
        rows = []
        for number, power in enumerate((x, squares, squares * x, squares * squares)):
            self.powers[:, number] += which @ power
            rows.append(power.mean(1))
        found = kurtosis_of(torch.stack(rows))
        self.kurtosis += _sum(found[found.isfinite()])

    def merge(self, other: Seen) -> None:
        """Add everything that another has seen; it is left as it is."""
        for name in ("powers", "large", "counts", "kurtosis", "ratio"):
            getattr(self, name).add_(getattr(other, name).to(self.powers.device))
        self.peaks = torch.maximum(self.peaks, other.peaks.to(self.peaks.device))
        self.tokens += other.tokens
        self.sample.merge(other.sample, self.powers.device)
        if self.gram is not None and other.gram is not None:
            self.gram.merge(other.gram)

    @classmethod
    def merged(cls, *parts: Seen) -> Seen:
        """Return what several saw together, without sample and Gram matrix."""
        made = cls(parts[0].width)
        for part in parts:
            made.merge(part)
        made.sample = Sample(0)
        return made

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.tokens.sum())

    @property
    def peak(self) -> Tensor:
        """Largest absolute value of every channel, ``[width]``, float32."""
        return self.peaks.amax(0)

    @property
    def energy(self) -> Tensor:
        """Sum of squares of every channel, ``[width]``, float64: the diagonal of ``x x^T``."""
        return self.powers[:, 1].sum(0)

    def is_finite(self) -> bool:
        """Tell whether no NaN or infinite value was seen."""
        return bool(self.powers.isfinite().all()) and bool(self.peaks.isfinite().all())


def kurtosis_of(means: Tensor) -> Tensor:
    """Return ``m4 / m2^2`` (3 for normal numbers) from means of the first four powers, ``[4, n]``.

    NaN where the values are all equal, as far as float64 tells.
    """
    first, second, third, fourth = means
    spread = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    found = central / spread.clamp_min(1e-300) ** 2
    nothing = torch.full_like(found, float("nan"))
    return torch.where(spread > _NO_SPREAD * second, found, nothing)


def middle(size: Tensor) -> Tensor:
    """Return the (lower) median of each row of absolute values, ``[tokens, in]``, float32."""
    if size.device.type != "cpu":
        return size.median(dim=1).values
    # The partial sort of numpy is faster; the bits of such floats are in the order of the numbers.
    place = (size.shape[1] - 1) // 2
    bits = np.partition(size.numpy().view(np.int32), place, axis=1)[:, place]
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.float32))


def _sum(values: Tensor) -> Tensor:
    """Return sum and number of values."""
    count = torch.tensor(float(len(values)), dtype=torch.float64, device=values.device)
    return torch.stack([values.sum(dtype=torch.float64), count])
