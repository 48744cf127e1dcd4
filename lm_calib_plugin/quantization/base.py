"""Common part of the weight quantization methods: width, groups, symmetry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import Method
from lm_calib_plugin.quantization.grids import IntegerGrid


@dataclass(frozen=True)
class QuantizationMethod(Method):
    """A method that rounds weights to an integer grid.

    Parameters
    ----------
    bits
        Width of a level number; 16 leaves the weights as they are.
    group_size
        Consecutive inputs that share a scale; -1 for one scale per output row.
    symmetric
        Whether the grid is symmetric around zero.
    """

    kind: ClassVar[str] = "quantization"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    @property
    def does_nothing(self) -> bool:
        """Whether the weights stay as they are (16 bits)."""
        return self.bits == 16

    def check_layer(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a layer whose width does not hold whole groups."""
        width = shape[1]
        if not self.does_nothing and self.group_size != -1 and width % self.group_size:
            fitting = [g for g in (256, 128, 96, 64, 48, 32, 16, 8) if width % g == 0]
            advice = ", ".join(map(str, [*fitting, -1]))
            raise UserError(
                "group_size",
                f"{self.group_size} does not divide the {width} inputs of layer {name}",
                f"for this layer: {advice}",
                f"for instance group_size={fitting[0] if fitting else -1}",
            )

    def fit_grid(self, weight: Tensor, dtype: torch.dtype) -> IntegerGrid:
        """Fit the grid of a weight ``[out, in]``."""
        return IntegerGrid.fit(weight, self.bits, self.group_size, self.symmetric, dtype)
