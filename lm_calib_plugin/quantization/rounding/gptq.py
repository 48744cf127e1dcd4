"""GPTQ: round column by column and let later columns absorb the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin import kernels
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.kernels import Levels
from lm_calib_plugin.method import LayerResult
from lm_calib_plugin.quantization.grids import Grid, IntegerGrid, stacked
from lm_calib_plugin.quantization.parts import Rounding, Setting
from lm_calib_plugin.statistics import LayerStats, gram_in, inverse_factor, output_error

BLOCK = 128
# Ridges that `damp=auto` tries, relative to the mean diagonal of the Gram matrix.
DAMPS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class GPTQ(Rounding):
    """Second-order rounding (Frantar et al., algorithm 1) with static groups.

    Scales are fixed from the original weights, in the original column order; ``act_order`` only
    changes the order in which columns are rounded (falling input energy), so nothing has to be
    permuted at run time.
    """

    statistic: ClassVar[str] = "gram"
    uses_damp: ClassVar[bool] = True
    uses_order: ClassVar[bool] = True
    corrects: ClassVar[bool] = True
    permutation_safe: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.17323"

    def prepared(self, weight: Tensor, stats: LayerStats | None, setting: Setting) -> Tensor:
        """Return the weight, without the columns of silent inputs where that is asked for."""
        if setting.compat != "reference":
            return weight
        return weight.masked_fill(gram_in(stats).diagonal().to(weight.device) == 0, 0.0)

    def round(
        self, weight: Tensor, grid: Grid, stats: LayerStats | None, setting: Setting
    ) -> LayerResult:
        """Round one weight ``[out, in]`` with the Gram matrix of its input."""
        return swept([weight], [grid], stats, setting)[0]

    def round_kept(
        self,
        weight: Tensor,
        keep: Tensor,
        grid: Grid,
        stats: LayerStats | None,
        setting: Setting,
    ) -> LayerResult:
        """Round and remove in one sweep; see :meth:`Rounding.round_kept`."""
        return swept([weight], [grid], stats, setting, [keep])[0]

    def round_together(
        self,
        weights: Sequence[Tensor],
        grids: Sequence[Grid],
        stats: LayerStats | None,
        setting: Setting,
        keeps: Sequence[Tensor] | None = None,
    ) -> list[LayerResult]:
        """Round all layers with one factor, and in one sweep where their grids are alike."""
        return swept(weights, grids, stats, setting, keeps)


def swept(
    weights: Sequence[Tensor],
    grids: Sequence[Grid],
    stats: LayerStats | None,
    setting: Setting,
    keeps: Sequence[Tensor] | None = None,
) -> list[LayerResult]:
    """Return weights that share an input after the sweep over their columns, with the ridge used.

    ``keeps`` (``[out, in]`` each, bool) are masks off which weights become zero; later columns
    absorb that error, too.
    """
    if setting.damp is not None:
        return _at(weights, grids, gram_in(stats), setting, setting.damp, keeps)
    assert stats is not None
    judge = heldout_gram(stats, "damp", "for instance damp=0.01")
    found = [_at(weights, grids, gram_in(stats), setting, damp, keeps) for damp in DAMPS]
    best = []
    for weight, ways in zip(weights, zip(*found, strict=True), strict=True):
        errors = [output_error(one.weight - weight, judge) for one in ways]
        best.append(ways[errors.index(min(errors))])
    return best


def heldout_gram(stats: LayerStats | None, argument: str, fix: str) -> Tensor:
    """Return the Gram matrix of the sequences held out, ``[in, in]``.

    The identity for an expert to which none of their tokens was sent.

    Raises
    ------
    UserError
        When nothing was held out.
    """
    kept = None if stats is None else stats.heldout
    if kept is None:
        raise UserError(
            argument,
            "chooses by the error on sequences held out, and there are none",
            "heldout > 0 with enough sequences (heldout=0.1 of 10 or more)",
            fix,
        )
    return gram_in(kept)


def _at(
    weights: Sequence[Tensor],
    grids: Sequence[Grid],
    gram: Tensor,
    setting: Setting,
    damp: float,
    keeps: Sequence[Tensor] | None,
) -> list[LayerResult]:
    gram = gram.to(weights[0].device)
    order = torch.arange(len(gram), device=gram.device)
    if setting.act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(gram[order][:, order], damp)
    # Rows of layers whose grids are alike are stacked; others at least share the factor.
    one = stacked(grids)
    parts = [list(range(len(grids)))] if one else [[i] for i in range(len(grids))]
    found: list[LayerResult] = []
    for part in parts:
        grid = one or grids[part[0]]
        columns = torch.cat([weights[i].t()[order] for i in part], dim=1)
        kept = None if keeps is None else torch.cat([keeps[i].t()[order] for i in part], dim=1)
        _sweep(columns, factor.upper, grid, order, kept)
        result = torch.empty_like(columns)
        result[order] = columns
        split = result.split([len(weights[i]) for i in part], dim=1)
        found += [
            LayerResult(weight.t().contiguous(), grid=grids[i], damp=factor.damp)
            for i, weight in zip(part, split, strict=True)
        ]
    return found


def _sweep(columns: Tensor, upper: Tensor, grid: Grid, order: Tensor, keep: Tensor | None) -> None:
    """Round ``columns`` (``[in, out]``, in visiting order), in place, one after another."""
    width = len(columns)
    group = torch.div(order, grid.group_size, rounding_mode="floor")
    places = group.tolist()
    levels = None
    if type(grid) is IntegerGrid:
        scale, zero = grid.scale.t().contiguous(), grid.zero.t().contiguous()
        levels = Levels(scale, zero, group, grid.lowest, grid.highest)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        block, inner = columns[start:stop], upper[start:stop, start:stop]
        kept = None if keep is None else keep[start:stop]
        if levels is not None:
            own = replace(levels, group=group[start:stop])
            errors = kernels.round_integers(block, inner, own, kept)
        else:
            found = _rounder(grid, places[start:stop])
            errors = kernels.round_with(block, inner, found, kept)
        columns[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)


def _rounder(grid: Grid, groups: list[int]) -> Callable[[int, Tensor], Tensor]:
    return lambda i, column: grid.round_column(column, groups[i])
