"""GPTQ with a guard: the layers that it would fit to their calibration data only stay at RTN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.method import LayerResult
from lm_calib_plugin.quantization.grids import Grid
from lm_calib_plugin.quantization.parts import Setting
from lm_calib_plugin.quantization.rounding.gptq import GPTQ, heldout_gram, swept
from lm_calib_plugin.statistics import LayerStats, output_error


@dataclass(frozen=True)
class GPTQHeldout(GPTQ):
    """For each layer the better one of GPTQ and rounding to nearest, by held-out output error.

    GPTQ can fit the calibration tokens at the expense of all others; the sequences held out tell.
    """

    uses_heldout: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = False

    def round(
        self, weight: Tensor, grid: Grid, stats: LayerStats | None, setting: Setting
    ) -> LayerResult:
        """Round one weight ``[out, in]`` both ways and keep the better result."""
        return _better(weight, grid, stats, setting, None)

    def round_kept(
        self,
        weight: Tensor,
        keep: Tensor,
        grid: Grid,
        stats: LayerStats | None,
        setting: Setting,
    ) -> LayerResult:
        """Round the weights of a mask both ways and keep the better result."""
        return _better(weight, grid, stats, setting, keep)


def _better(
    weight: Tensor, grid: Grid, stats: LayerStats | None, setting: Setting, keep: Tensor | None
) -> LayerResult:
    found = swept(weight, grid, stats, setting, keep)
    judge = heldout_gram(stats, "rounding", "or rounding=gptq")
    nearest = grid.round(weight)
    if keep is not None:
        nearest = nearest * keep
    if output_error(found.weight - weight, judge) <= output_error(nearest - weight, judge):
        return found
    return replace(found, weight=nearest, damp=None, fallback="rtn")
