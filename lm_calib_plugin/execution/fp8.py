"""FP8 weights and inputs (e4m3) on CUDA: ``torch._scaled_mm`` with a scale per row and token.

Interface: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_mm.html
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lm_calib_plugin.execution.base import PackedLinear
from lm_calib_plugin.execution.facts import Activation, Facts, has_op, multiple_of
from lm_calib_plugin.execution.fuse import Fused
from lm_calib_plugin.execution.levels import (
    fp8_levels,
    fp8_rows,
    quantize_rows,
    static_scale,
)
from lm_calib_plugin.quantization.grids import Grid

NEEDED = (8, 9)


class FP8Linear(PackedLinear):
    """e4m3 weights with a scale per row, e4m3 inputs with one per token or per layer.

    Sums are accumulated in float32 without the faster accumulation of Hopper, which keeps fewer
    bits; the output is bfloat16.
    """

    kernel = "fp8"
    quantizes_inputs = True
    number = "fp8"

    def __init__(
        self, levels: Tensor, scale: Tensor, bias: nn.Parameter | None, activation: Activation
    ) -> None:
        super().__init__(levels, bias, activation)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("static", static_scale(activation, levels.device), persistent=False)
        self.levels: Tensor
        self.scale: Tensor
        self.static: Tensor | None

    @classmethod
    def from_layer(
        cls, weight: Tensor, grid: Grid | None, bias: Any, activation: Activation | None
    ) -> Self:
        """Pack a weight that lies on an e4m3 grid with one scale per row."""
        assert grid is not None
        assert activation is not None
        scale = grid.scale.to(weight.device).reshape(1, -1)
        packed = cls(fp8_levels(weight, grid), scale, bias, activation)
        packed.weight_dtype = weight.dtype
        return packed

    @staticmethod
    def refusal(facts: Facts) -> str | None:
        """Return why the kernel cannot serve a layer, None if it can."""
        if facts.number != "fp8":
            return "serves fp8 weights only"
        if facts.activation is None or facts.activation.number != "fp8":
            return "needs fp8 inputs (scheme=FP8 or FP8_static)"
        if facts.device.capability is None or facts.device.capability < NEEDED:
            return "needs a CUDA device of capability 8.9 or newer (H100, L40, RTX 40)"
        if facts.dtype != torch.bfloat16:
            return "writes bfloat16 (dtype=bfloat16)"
        if not facts.per_row:
            return "needs one scale per output row (group_size=-1)"
        if not has_op("aten._scaled_mm"):
            return f"torch {torch.__version__} has no _scaled_mm"
        return multiple_of(facts, 16, 16)

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply input rows ``[tokens, in]``."""
        levels, scale = _quantize(rows, self.static)
        out = torch._scaled_mm(levels, self.levels.t(), scale, self.scale, out_dtype=torch.bfloat16)
        return out if self.bias is None else out + self.bias

    @classmethod
    def emulate(
        cls,
        rows: Tensor,
        weight: Tensor,
        grid: Grid | None,
        bias: Tensor | None,
        activation: Activation | None,
    ) -> Tensor:
        """Multiply the e4m3 values in float32, then scale and round to bfloat16."""
        assert grid is not None
        assert activation is not None
        levels, scale = quantize_rows(rows, activation)
        product = levels.float() @ fp8_levels(weight, grid).float().t()
        out = (product * scale * grid.scale.reshape(1, -1)).to(torch.bfloat16)
        return out if bias is None else out + bias.to(torch.bfloat16)

    def dense_weight(self) -> Tensor:
        """Return the weight ``[out, in]`` that was packed."""
        return (self.levels.float() * self.scale.t()).to(self.weight_dtype)


_quantize: Any = Fused(fp8_rows)
