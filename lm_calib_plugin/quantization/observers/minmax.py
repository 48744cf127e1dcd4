"""The levels span everything that was seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lm_calib_plugin.quantization.parts import Observer


@dataclass(frozen=True)
class MinMax(Observer):
    """The largest absolute value of the calibration tokens (Jacob et al., section 3).

    Parameters
    ----------
    first
        Whether the first token of every sequence counts. Massive activations sit mostly there: a
        range without them serves all other tokens better, and clips the first.
    """

    statistic: ClassVar[str] = "ranges"
    paper: ClassVar[str] = "https://arxiv.org/abs/1712.05877"
    first: bool = True

    def limit(self, ranges: Any, spec: Any) -> float:
        """Return the largest value seen; 1 when all values were zero."""
        found = ranges.limit if self.first else ranges.limit_without_first
        return found or 1.0
