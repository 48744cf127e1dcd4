"""HQQ: half-quadratic quantization, a zero point fitted to the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import LayerResult
from lm_calib_plugin.quantization.grids import Grid, GridSpec, IntegerGrid, RealZeroGrid
from lm_calib_plugin.quantization.parts import Rounding, Setting
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class HQQ(Rounding):
    """Fit a real zero point to each group for a small ``sum |w - w'|^p``, without any data.

    Half-quadratic splitting (Badri and Shaji, 2023): with ``e`` in the place of the error, ``beta``
    the weight of the difference between the two, and scales fixed, take turns with

    * ``w' = scale * (q - zero)``, the levels ``q`` nearest to ``w``,
    * ``e = sign(r) max(|r| - |r|^(p-1) / beta, 0)`` with ``r = w - w'``,
    * ``zero = mean(q - (w - e) / scale)``, and ``beta`` times ``kappa``.

    A group stops at its first step that does not lower its sum, and keeps the zero point with the
    smallest, that of the grid among them; so none ends worse than rounding to nearest.

    Notes
    -----
    The authors' code stops all groups together, by the mean absolute error of the whole weight;
    here each row stays independent of the others. The threshold is not scaled to the weights, as
    there: with weights far below 1, ``e`` is mostly 0.

    Parameters
    ----------
    p
        Power of the error, above 0 and at most 1: the smaller, the less large errors count.
    beta, kappa
        Weight of the difference at the start, and its growth from step to step.
    steps
        Most steps.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20

    keeps_zeros: ClassVar[bool] = False
    real_zeros: ClassVar[bool] = True
    permutation_safe: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = True
    paper: ClassVar[str] = "https://mobiusml.github.io/hqq_blog/"

    def __post_init__(self) -> None:
        self.at_least("p", 0.01)
        if self.p > 1:
            raise UserError(self.stage, f"got p={self.p:g}", "p <= 1")
        self.at_least("beta", 1e-6)
        self.at_least("kappa", 1)
        self.at_least("steps", 0)

    def check(self, spec: GridSpec) -> None:
        """Refuse grids without a zero point."""
        if spec.number != "int":
            raise UserError(
                self.stage,
                f"hqq fits zero points, and {spec.number} has none",
                "integers with symmetric=false",
                "for instance bits=4, group_size=64, symmetric=false, or rounding=rtn",
            )
        if spec.symmetric:
            raise UserError(
                "symmetric",
                "hqq fits zero points, and a symmetric grid has none",
                "false with rounding=hqq",
                "symmetric=false",
            )

    def round(
        self, weight: Tensor, grid: Grid, stats: LayerStats | None, setting: Setting
    ) -> LayerResult:
        """Round one weight ``[out, in]``; the grid of the result has real zero points."""
        if not isinstance(grid, IntegerGrid) or grid.symmetric:
            raise ValueError("hqq needs an asymmetric integer grid")
        groups = weight.reshape(weight.shape[0], -1, grid.group_size)
        found = RealZeroGrid.of(grid, self._zeros(groups, grid))
        return LayerResult(found.round(weight), grid=found)

    def _zeros(self, groups: Tensor, grid: IntegerGrid) -> Tensor:
        """Return the zero points ``[out, groups]`` for weights ``[out, groups, size]``."""
        scale, beta = grid.scale[..., None], self.beta
        current = RealZeroGrid.of(grid, grid.zero)
        rounded = current.round_group(groups, scale, current.zero[..., None])
        best, smallest = current.zero, self._sums(groups, rounded)
        going = torch.ones_like(best, dtype=torch.bool)
        for _ in range(self.steps):
            error = shrunk(groups - rounded, beta, self.p)
            level = (rounded / scale).add_(current.zero[..., None]).round_()
            zero = (level - (groups - error) / scale).mean(dim=-1)
            current = RealZeroGrid.of(grid, zero)
            rounded = current.round_group(groups, scale, current.zero[..., None])
            sums = self._sums(groups, rounded)
            going &= sums < smallest
            if not going.any():
                break
            best = torch.where(going, current.zero, best)
            smallest = torch.where(going, sums, smallest)
            beta *= self.kappa
        return best

    def _sums(self, groups: Tensor, rounded: Tensor) -> Tensor:
        return (groups - rounded).abs_().pow_(self.p).sum(dim=-1)


def shrunk(x: Tensor, beta: float, p: float) -> Tensor:
    """Return ``sign(x) max(|x| - |x|^(p-1) / beta, 0)``, 0 for 0."""
    size = x.abs()
    return x.sign() * (size - size.pow(p - 1) / beta).clamp_(min=0)
