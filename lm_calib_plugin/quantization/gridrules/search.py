"""The search for how much of its range each group keeps, by any measure of the rounding error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.grids import Grid, GridSpec
from lm_calib_plugin.quantization.parts import GridRule


@dataclass(frozen=True)
class RangeSearch(GridRule):
    """A rule that tries ranges from the whole down to a part of it.

    Parameters
    ----------
    steps
        Ranges tried beside the whole, evenly spaced.
    low
        The smallest part of the range, above 0 and at most 1.
    """

    steps: int = 20
    low: float = 0.5

    def __post_init__(self) -> None:
        self.at_least("steps", 0)
        self.at_least("low", 0.01)
        if self.low > 1:
            raise UserError(self.stage, f"got low={self.low:g}", "low <= 1")

    @property
    def factors(self) -> list[float]:
        """The parts of the range that are tried, the whole first."""
        return [1 - (1 - self.low) * k / self.steps if k else 1.0 for k in range(self.steps + 1)]

    def best(
        self,
        weight: Tensor,
        spec: GridSpec,
        dtype: torch.dtype,
        errors: Callable[[Tensor], Tensor],
    ) -> Grid:
        """Return the grid with, for each row and group, the range of the smallest error.

        Among equals the largest range wins. One candidate is held at a time.

        Parameters
        ----------
        weight, spec, dtype
            As of ``GridRule.fit``.
        errors
            From rounding differences ``[out, groups, size]`` to their errors, ``[out, groups]``.
        """
        grid = spec.fit(weight, dtype)
        chosen, smallest = torch.ones_like(grid.scale), None
        for factor in self.factors:
            shrink = torch.tensor(factor, device=weight.device)
            difference = spec.fit(weight, dtype, shrink).round(weight).sub_(weight)
            found = errors(difference.unflatten(1, (-1, grid.group_size)))
            better = None if smallest is None else found < smallest
            smallest = found if better is None else torch.where(better, found, smallest)
            chosen = chosen if better is None else torch.where(better, shrink, chosen)
        return spec.fit(weight, dtype, chosen)
