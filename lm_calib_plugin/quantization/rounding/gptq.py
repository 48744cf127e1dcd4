"""GPTQ: round column by column and let later columns absorb the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import LayerResult
from lm_calib_plugin.quantization.grids import Grid
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
        return swept(weight, grid, stats, setting)

    def round_kept(
        self,
        weight: Tensor,
        keep: Tensor,
        grid: Grid,
        stats: LayerStats | None,
        setting: Setting,
    ) -> LayerResult:
        """Round and remove in one sweep; see :meth:`Rounding.round_kept`."""
        return swept(weight, grid, stats, setting, keep)


def swept(
    weight: Tensor,
    grid: Grid,
    stats: LayerStats | None,
    setting: Setting,
    keep: Tensor | None = None,
) -> LayerResult:
    """Return the weight after the sweep over its columns, with the ridge that was used.

    ``keep`` (``[out, in]``, bool) is a mask off which weights become zero; later columns absorb
    that error, too.
    """
    if setting.damp is not None:
        return _at(weight, grid, gram_in(stats), setting, setting.damp, keep)
    assert stats is not None
    judge = heldout_gram(stats, "damp", "for instance damp=0.01")
    found = [_at(weight, grid, gram_in(stats), setting, damp, keep) for damp in DAMPS]
    errors = [output_error(one.weight - weight, judge) for one in found]
    return found[errors.index(min(errors))]


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
    weight: Tensor, grid: Grid, gram: Tensor, setting: Setting, damp: float, keep: Tensor | None
) -> LayerResult:
    gram = gram.to(weight.device)
    order = torch.arange(weight.shape[1], device=weight.device)
    if setting.act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(gram[order][:, order], damp)
    columns = weight.t()[order].contiguous()
    kept = None if keep is None else keep.t()[order].contiguous()
    rounded = _sweep(columns, factor.upper, grid, order, kept)
    result = torch.empty_like(rounded)
    result[order] = rounded
    return LayerResult(result.t().contiguous(), grid=grid, damp=factor.damp)


def _sweep(
    columns: Tensor, upper: Tensor, grid: Grid, order: Tensor, keep: Tensor | None
) -> Tensor:
    """Round ``columns`` (``[in, out]``, in visiting order, changed in place) one after another."""
    width = columns.shape[0]
    group = torch.div(order, grid.group_size, rounding_mode="floor").tolist()
    rounded = torch.empty_like(columns)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        block, inner = columns[start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        diagonal = inner.diagonal().tolist()
        for i in range(stop - start):
            found = grid.round_column(block[i], group[start + i])
            rounded[start + i] = found if keep is None else found * keep[start + i]
            errors[i] = (block[i] - rounded[start + i]) / diagonal[i]
            block[i + 1 :] -= torch.outer(inner[i, i + 1 :], errors[i])
        columns[stop:] -= upper[start:stop, stop:].t() @ errors
    return rounded
