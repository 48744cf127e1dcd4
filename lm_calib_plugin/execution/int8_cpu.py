"""Integer weights and inputs of up to 8 bits on a CPU with AVX-512 VNNI, by oneDNN.

The operator takes one input scale per call. It is given 1, and the scales of tokens are applied
behind it, so that what it sums are the same integers as in the simulated model. (The dynamic
linear layer of ``torch.ao.quantization`` rounds inputs to one asymmetric range per *batch*: faster
to call, but another scheme.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lm_calib_plugin.execution.base import PackedLinear, identity_rows
from lm_calib_plugin.execution.facts import Activation, Facts, has_op
from lm_calib_plugin.execution.int8 import Int8Linear, integer_refusal
from lm_calib_plugin.execution.levels import integer_levels, quantize_rows
from lm_calib_plugin.quantization.grids import Grid

# Inputs are handed over as unsigned bytes around this; signed ones take a path that is a
# thousand times slower.
MIDDLE = 128


class Int8CPULinear(PackedLinear):
    """As :class:`Int8Linear`: a scale per row of weights, and one per token or layer of inputs."""

    kernel = "int8_cpu"
    quantizes_inputs = True
    number = "int"
    device_kind = "cpu"

    def __init__(
        self, levels: Tensor, scale: Tensor, bias: nn.Parameter | None, activation: Activation
    ) -> None:
        super().__init__(levels, bias, activation)
        # In the order of the device; opaque, so not a buffer that could be saved or moved.
        self.packed = torch.ops.onednn.qlinear_prepack(levels, None)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int64), persistent=False)
        self.scale: Tensor
        self.zero: Tensor

    @classmethod
    def from_layer(
        cls, weight: Tensor, grid: Grid | None, bias: Any, activation: Activation | None
    ) -> Self:
        """Pack a weight that lies on a symmetric integer grid with one scale per row."""
        assert grid is not None
        assert activation is not None
        levels = integer_levels(weight, grid).to(torch.int8)
        packed = cls(levels, grid.scale.reshape(-1).clone(), bias, activation)
        packed.weight_dtype = weight.dtype
        return packed

    @staticmethod
    def refusal(facts: Facts) -> str | None:
        """Return why the kernel cannot serve a layer, None if it can."""
        wrong = integer_refusal(facts)
        if wrong is not None:
            return wrong
        if facts.device.kind != "cpu":
            return "runs on a CPU only"
        if not facts.device.vnni:
            # Without it sums of pairs saturate, or bytes are multiplied one by one.
            return "needs a CPU with AVX-512 VNNI"
        if not has_op("onednn.qlinear_pointwise"):
            return f"torch {torch.__version__} has no onednn.qlinear_pointwise"
        return None

    @property
    def weight_bytes(self) -> int:
        """Bytes that levels and scales take in memory."""
        return self.in_features * self.out_features + 4 * self.out_features

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply input rows ``[tokens, in]``; float32."""
        assert self.activation is not None
        levels, scale = quantize_rows(rows, self.activation)
        # Adding 128 modulo 256 is the same as adding it to the value.
        out = self._product(levels.view(torch.uint8) + MIDDLE, self.scale).mul_(scale)
        return out if self.bias is None else out.add_(self.bias.float())

    def _product(self, unsigned: Tensor, scale: Tensor) -> Tensor:
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned,
            1.0,
            MIDDLE,
            self.packed,
            scale,
            self.zero,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return product

    @classmethod
    def emulate(
        cls,
        rows: Tensor,
        weight: Tensor,
        grid: Grid | None,
        bias: Tensor | None,
        activation: Activation | None,
    ) -> Tensor:
        """Sum integers exactly, then scale in float32."""
        return Int8Linear.emulate(rows, weight, grid, bias, activation)

    def dense_weight(self) -> Tensor:
        """Return the weight ``[out, in]`` that was packed: the layer's answers to unit inputs."""
        ones = torch.ones_like(self.scale)
        units = identity_rows(self.in_features, torch.device("cpu"), torch.uint8)
        levels = torch.cat([self._product(rows + MIDDLE, ones) for rows in units]).t()
        return (levels * self.scale[:, None]).to(self.weight_dtype)
