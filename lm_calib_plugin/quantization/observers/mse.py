"""The levels span the range with the smallest squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.activations import ActivationSpec
from lm_calib_plugin.quantization.parts import Observer
from lm_calib_plugin.statistics import Ranges

# Points at which the error is taken within each bin of the histogram.
POINTS = 16


@dataclass(frozen=True)
class MSE(Observer):
    """The limit that balances what is clipped against how coarse the levels get.

    The expected squared error of an activation under the histogram of calibration, values spread
    evenly within a bin, for equally spaced shares of the largest value (Banner et al. weigh the
    same two errors under a model of the distribution). Of equal errors the widest range wins.

    Parameters
    ----------
    first
        Whether the first token of every sequence counts.
    steps
        How many limits are tried.
    lowest
        Smallest share of the largest value that is tried.
    """

    statistic: ClassVar[str] = "ranges"
    paper: ClassVar[str] = "https://arxiv.org/abs/1810.05723"
    first: bool = True
    steps: int = 100
    lowest: float = 0.2

    def __post_init__(self) -> None:
        self.at_least("steps", 1)
        if not 0 < self.lowest <= 1:
            raise UserError(self.stage, f"got lowest={self.lowest:g}", "0 < lowest <= 1")

    def limit(self, ranges: Any, spec: Any) -> float:
        """Return the best of the limits tried; 1 when all values were zero.

        Raises
        ------
        UserError
            For numbers whose scales are shared by blocks: a histogram does not tell their error.
        """
        if spec.number not in ("int", "fp8"):
            raise UserError(
                self.stage,
                f"got mse for {spec.number}",
                "mse chooses the range of int and fp8 activations",
                "observer=minmax",
            )
        most = ranges.limit if self.first else ranges.limit_without_first
        if not most:
            return 1.0
        values, counts = self._values(ranges)
        shares = torch.linspace(1, self.lowest, self.steps, dtype=torch.float64)
        limits = [float(share) * most for share in shares]
        return min(limits, key=lambda limit: _error(values, counts, limit, spec))

    def _values(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        low, high, counts = ranges.bins(self.first)
        place = (torch.arange(POINTS, device=low.device) + 0.5) / POINTS
        values = low[:, None] + (high - low)[:, None] * place
        return values.float(), counts


def _error(values: Tensor, counts: Tensor, limit: float, spec: ActivationSpec) -> float:
    """Return the squared error of absolute values with a number of occurrences, both signs."""
    bound = torch.tensor(limit, device=values.device)
    # There is one negative level more than there are positive ones.
    both = [(spec.round(v, bound) - v).double().square().mean(dim=1) for v in (values, -values)]
    return float((counts * (both[0] + both[1])).sum())
