"""SparseGPT: second-order mask selection with an update of the weights that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.method import LayerResult
from lm_calib_plugin.pruning.base import PruningMethod
from lm_calib_plugin.pruning.masks import (
    keep_by_threshold,
    keep_highest,
    keep_n_of_m,
    removed_count,
)
from lm_calib_plugin.statistics import Gram, InverseFactor, LayerStats, inverse_factor

BLOCK = 128


@dataclass(frozen=True)
class SparseGPT(PruningMethod):
    """Optimal-brain-surgeon sweep over the columns (Frantar and Alistarh, algorithm 1).

    Columns are visited left to right. For every 128 of them the mask is chosen from the weights
    as already updated, by ``W_ij^2 / U_jj^2`` over all rows (for N:M at every M-th column, within
    each group of a row); the error of a removed weight is spread over the columns to its right.

    Parameters
    ----------
    damp
        Ridge added to the Gram matrix, relative to its mean diagonal.
    compat
        ``reference``: threshold rule of the paper's code (one weight more per block, and ties),
        and weights of inputs that were always zero are removed beforehand.
    """

    statistic: ClassVar[str] = "gram"
    paper: ClassVar[str] = "https://arxiv.org/abs/2301.00774"
    damp: float = 0.01

    def compress(
        self, weight: Tensor, stats: LayerStats | None, dtype: torch.dtype = torch.float32
    ) -> LayerResult:
        """Prune and update one weight ``[out, in]`` with the Gram matrix of its input."""
        if not isinstance(stats, Gram):
            raise ValueError("sparsegpt needs the Gram matrix of the inputs")
        factor = inverse_factor(stats.gram().to(weight.device), self.damp)
        # Transposed, so that a column of the weight is contiguous in memory.
        columns = weight.t().contiguous()
        if columns.data_ptr() == weight.data_ptr():
            columns = columns.clone()
        if self.compat == "reference":
            columns[factor.dead] = 0.0
        width = columns.shape[0]
        block = BLOCK
        if self.n_of_m:
            # A block holds whole groups.
            block = max(1, BLOCK // self.n_of_m[1]) * self.n_of_m[1]
        for start in range(0, width, block):
            stop = min(start + block, width)
            errors = self._sweep_block(columns[start:stop], factor, start)
            columns[stop:] -= factor.upper[start:stop, stop:].t() @ errors
        return LayerResult(columns.t().contiguous(), damp=factor.damp)

    def _sweep_block(self, block: Tensor, factor: InverseFactor, start: int) -> Tensor:
        """Prune ``block`` (``[columns, out]``) in place; return the scaled errors, same shape."""
        stop = start + block.shape[0]
        upper = factor.upper[start:stop, start:stop]
        diagonal, dead = upper.diagonal(), factor.dead[start:stop]
        keep = self._block_mask(block, diagonal, dead)
        errors = torch.zeros_like(block)
        for i in range(block.shape[0]):
            if self.n_of_m and i % self.n_of_m[1] == 0:
                group = slice(i, i + self.n_of_m[1])
                scores = self._scores(block[group], diagonal[group], dead[group])
                keep[group] = keep_n_of_m(scores.t(), *self.n_of_m).t()
            column = block[i]
            errors[i] = column.masked_fill(keep[i], 0.0) / diagonal[i]
            block[i + 1 :] -= torch.outer(upper[i, i + 1 :], errors[i])
            column.masked_fill_(~keep[i], 0.0)
        return errors

    @staticmethod
    def _scores(block: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
        return (block / diagonal[:, None]).square().masked_fill(dead[:, None], 0.0)

    def _block_mask(self, block: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
        if self.n_of_m:
            return torch.ones_like(block, dtype=torch.bool)
        # Transposed back: ties are broken by output row first, then by column.
        scores = self._scores(block, diagonal, dead).t().reshape(1, -1)
        if self.compat == "reference":
            mask = keep_by_threshold(scores, self.sparsity)
        else:
            mask = keep_highest(scores, removed_count(scores.shape[1], self.sparsity))
        return mask.reshape(block.shape[1], block.shape[0]).t().contiguous()
