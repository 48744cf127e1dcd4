"""Angular distance: remove the run of consecutive blocks that turns its input the least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.structure.base import DepthMethod, chord


@dataclass(frozen=True)
class Angular(DepthMethod):
    """Smallest ``arccos(cos(h_l, h_l+n)) / pi`` over the start l (Gromov et al.).

    The mean is taken over the last token of every sequence.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.17887"
    contiguous: ClassVar[bool] = True

    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the angle between rows as a fraction of a half turn, ``[rows]``."""
        return (chord(before, after) / 2).clamp(max=1).arcsin() * (2 / math.pi)

    def choose(self, values: Sequence[float], count: int) -> list[int]:
        """Return the run of ``count`` blocks that starts at the lowest value.

        Parameters
        ----------
        values
            One for every possible start.
        """
        start = min(range(len(values)), key=lambda i: (values[i], i))
        return list(range(start, start + count))
