"""The levels span all but the largest few of the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.parts import Observer


@dataclass(frozen=True)
class Percentile(Observer):
    """The absolute value that ``q`` percent of all values do not exceed (Wu et al., section 5.2).

    Parameters
    ----------
    q
        A percentage above 0, at most 100.
    first
        Whether the first token of every sequence counts.
    """

    statistic: ClassVar[str] = "ranges"
    paper: ClassVar[str] = "https://arxiv.org/abs/2004.09602"
    q: float = 99.9
    first: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.q <= 100:
            raise UserError(
                self.stage,
                f"got q={self.q:g}",
                "a percentage, 0 < q <= 100",
                "for instance observer=percentile?q=99.9",
            )

    def limit(self, ranges: Any, spec: Any) -> float:
        """Return the percentile of the absolute values; the largest of all when it is zero."""
        found = ranges.quantile(self.q / 100, self.first)
        return found or ranges.limit or 1.0
