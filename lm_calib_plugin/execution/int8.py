"""Integer weights and inputs of up to 8 bits on CUDA: ``torch._int_mm`` and an epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lm_calib_plugin.execution.base import PackedLinear
from lm_calib_plugin.execution.facts import Activation, Facts, has_op, multiple_of
from lm_calib_plugin.execution.fuse import Fused
from lm_calib_plugin.execution.levels import (
    integer_levels,
    integer_rows,
    quantize_rows,
    static_scale,
)
from lm_calib_plugin.quantization.grids import Grid

# `_int_mm` on CUDA takes more rows than this.
FEWEST_ROWS = 16


class Int8Linear(PackedLinear):
    """Symmetric integer weights with a scale per row, integer inputs with one per token or layer.

    Levels of fewer bits fit as well (W4A8, W4A4 with ``group_size=-1``), in a byte each. The
    integer sum is exact; both scales are applied in float32.
    """

    kernel = "int8"
    quantizes_inputs = True
    number = "int"

    def __init__(
        self, levels: Tensor, scale: Tensor, bias: nn.Parameter | None, activation: Activation
    ) -> None:
        super().__init__(levels, bias, activation)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("static", static_scale(activation, levels.device), persistent=False)
        bound = torch.full((), 2.0 ** (activation.bits - 1), device=levels.device)
        self.register_buffer("bound", bound, persistent=False)
        self.bound: Tensor
        self.levels: Tensor
        self.scale: Tensor
        self.static: Tensor | None

    @classmethod
    def from_layer(
        cls, weight: Tensor, grid: Grid | None, bias: Any, activation: Activation | None
    ) -> Self:
        """Pack a weight that lies on a symmetric integer grid with one scale per row."""
        assert grid is not None
        assert activation is not None
        levels = integer_levels(weight, grid).to(torch.int8)
        packed = cls(levels, grid.scale.to(weight.device).reshape(-1), bias, activation)
        packed.weight_dtype = weight.dtype
        return packed

    @staticmethod
    def refusal(facts: Facts) -> str | None:
        """Return why the kernel cannot serve a layer, None if it can."""
        wrong = integer_refusal(facts)
        if wrong is not None:
            return wrong
        if facts.device.capability is None or facts.device.capability < (7, 5):
            return "needs a CUDA device of capability 7.5 or newer"
        if not has_op("aten._int_mm"):
            return f"torch {torch.__version__} has no _int_mm"
        return multiple_of(facts, 8, 8)

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply input rows ``[tokens, in]``."""
        levels, scale = _quantize(rows, self.bound, self.static)
        missing = FEWEST_ROWS + 1 - len(levels)
        if missing > 0:
            levels = nn.functional.pad(levels, (0, 0, 0, missing))
        total = torch._int_mm(levels, self.levels.t())[: len(rows)]
        return _epilogue(total, scale, self.scale, self.bias, rows.dtype)

    @classmethod
    def emulate(
        cls,
        rows: Tensor,
        weight: Tensor,
        grid: Grid | None,
        bias: Tensor | None,
        activation: Activation | None,
    ) -> Tensor:
        """Sum integers exactly (in float64), then scale in float32."""
        assert grid is not None
        assert activation is not None
        levels, scale = quantize_rows(rows, activation)
        total = levels.double() @ integer_levels(weight, grid).double().t()
        return scaled(total.to(torch.int32), scale, grid.scale.reshape(-1), bias, rows.dtype)

    def dense_weight(self) -> Tensor:
        """Return the weight ``[out, in]`` that was packed."""
        return (self.levels.float() * self.scale[:, None]).to(self.weight_dtype)


def integer_refusal(facts: Facts) -> str | None:
    """Return why symmetric integer weights per row with integer inputs is not what this is."""
    if facts.number != "int" or not 2 <= facts.bits <= 8:
        return "serves integer weights of 2 to 8 bits only"
    if facts.activation is None or facts.activation.number != "int" or facts.activation.bits > 8:
        return "needs integer inputs of at most 8 bits (scheme=W8A8)"
    if not facts.per_row:
        return "needs one scale per output row (group_size=-1)"
    if not facts.symmetric:
        return "needs a symmetric grid (symmetric=true)"
    return None


def scaled(
    total: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Apply the scales of tokens ``[tokens, 1]`` and rows ``[out]`` in float32, add the bias."""
    out = total.float() * row_scale * scale
    return (out if bias is None else out + bias.float()).to(dtype)


_quantize: Any = Fused(integer_rows)
_epilogue: Any = Fused(scaled)
