"""GPTQ with a guard: the layers that it would fit to their calibration data only stay at RTN."""

from __future__ import annotations

from collections.abc import Sequence
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
        return self.round_together([weight], [grid], stats, setting)[0]

    def round_kept(
        self,
        weight: Tensor,
        keep: Tensor,
        grid: Grid,
        stats: LayerStats | None,
        setting: Setting,
    ) -> LayerResult:
        """Round the weights of a mask both ways and keep the better result."""
        return self.round_together([weight], [grid], stats, setting, [keep])[0]

    def round_together(
        self,
        weights: Sequence[Tensor],
        grids: Sequence[Grid],
        stats: LayerStats | None,
        setting: Setting,
        keeps: Sequence[Tensor] | None = None,
    ) -> list[LayerResult]:
        """Round all layers both ways and keep the better result of each."""
        found = swept(weights, grids, stats, setting, keeps)
        judge = heldout_gram(stats, "rounding", "or rounding=gptq")
        masks = [None] * len(weights) if keeps is None else keeps
        each = zip(found, weights, grids, masks, strict=True)
        return [_better(one, weight, grid, keep, judge) for one, weight, grid, keep in each]


def _better(
    found: LayerResult, weight: Tensor, grid: Grid, keep: Tensor | None, judge: Tensor
) -> LayerResult:
    nearest = grid.round(weight)
    if keep is not None:
        nearest = nearest * keep
    if output_error(found.weight - weight, judge) <= output_error(nearest - weight, judge):
        return found
    return replace(found, weight=nearest, damp=None, fallback="rtn")
