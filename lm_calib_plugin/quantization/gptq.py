"""GPTQ: round column by column and let later columns absorb the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.method import LayerResult
from lm_calib_plugin.quantization.base import QuantizationMethod
from lm_calib_plugin.quantization.grids import IntegerGrid
from lm_calib_plugin.statistics import LayerStats, gram_in, inverse_factor

BLOCK = 128


@dataclass(frozen=True)
class GPTQ(QuantizationMethod):
    """Second-order rounding (Frantar et al., algorithm 1) with static groups.

    Scales are fixed from the original weights, in the original column order; ``act_order`` only
    changes the order in which columns are rounded (falling input energy), so nothing has to be
    permuted at run time.

    Parameters
    ----------
    act_order
        Visit columns by falling diagonal of the Gram matrix.
    damp
        Ridge added to the Gram matrix, relative to its mean diagonal.
    compat
        ``reference``: weights of inputs that were always zero are set to zero beforehand.
    """

    statistic: ClassVar[str] = "gram"
    permutation_safe: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.17323"
    act_order: bool = True
    damp: float = 0.01
    compat: str | None = None

    def compress(
        self, weight: Tensor, stats: LayerStats | None, dtype: torch.dtype = torch.float32
    ) -> LayerResult:
        """Round one weight ``[out, in]`` with the Gram matrix of its input."""
        gram = gram_in(stats).to(weight.device)
        if self.compat == "reference":
            weight = weight.masked_fill(gram.diagonal() == 0, 0.0)
        grid = self.fit_grid(weight, dtype)
        order = torch.arange(weight.shape[1], device=weight.device)
        if self.act_order:
            order = gram.diagonal().argsort(descending=True, stable=True)
        factor = inverse_factor(gram[order][:, order], self.damp)
        columns = weight.t()[order].contiguous()
        rounded = _sweep(columns, factor.upper, grid, order)
        result = torch.empty_like(rounded)
        result[order] = rounded
        return LayerResult(result.t().contiguous(), grid=grid, damp=factor.damp)


def _sweep(columns: Tensor, upper: Tensor, grid: IntegerGrid, order: Tensor) -> Tensor:
    """Round ``columns`` (``[in, out]``, in visiting order, changed in place) one after another."""
    width = columns.shape[0]
    group = torch.div(order, grid.group_size, rounding_mode="floor").tolist()
    scales, zeros = grid.scale.t().contiguous(), grid.zero.t().contiguous()
    rounded = torch.empty_like(columns)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        block, inner = columns[start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        diagonal = inner.diagonal().tolist()
        for i in range(stop - start):
            g = group[start + i]
            rounded[start + i] = grid.round_group(block[i], scales[g], zeros[g])
            errors[i] = (block[i] - rounded[start + i]) / diagonal[i]
            block[i + 1 :] -= torch.outer(inner[i, i + 1 :], errors[i])
        columns[stop:] -= upper[start:stop, stop:].t() @ errors
    return rounded
