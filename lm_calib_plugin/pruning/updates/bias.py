"""Bias correction: the mean of the output is restored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.pruning.parts import Selection, Strength, Update
from lm_calib_plugin.statistics import LayerStats, spread_in


@dataclass(frozen=True)
class Bias(Update):
    """Add ``(W - W') mean(x)`` to the bias of a layer; the mean output is then that of ``W``.

    The best change of a bias in the least-squares sense; weights stay as they are. For models whose
    layers have biases (OPT, GPT-2, Phi); others are refused.
    """

    statistic: ClassVar[str] = "spread"
    rows_independent: ClassVar[bool] = True
    needs_bias: ClassVar[bool] = True

    def update(
        self,
        weight: Tensor,
        selection: Selection,
        stats: LayerStats | None,
        strength: Strength,
    ) -> Selection:
        """Return the selection with the change of the bias, ``[out]``."""
        kept = selection.but(weight=None)
        mean = spread_in(stats).mean().to(weight.device)
        return kept.but(bias=(weight - kept.values(weight)) @ mean)
