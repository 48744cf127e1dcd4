"""4-bit weights, inputs as they are: the ``_weight_int4pack_mm`` operators of torch.

They compute ``w = (q - 8) * scale + zero`` with ``q`` in 0..15, in bfloat16. A symmetric level
``l`` in -8..7 is ``q = l + 8`` with ``zero = 0``, exactly. An asymmetric grid ``scale * (q - z)``
has ``zero = (8 - z) * scale``, which bfloat16 rounds: by up to 1/64 of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lm_calib_plugin.execution.base import PackedLinear, identity_rows
from lm_calib_plugin.execution.facts import Facts, has_op, multiple_of
from lm_calib_plugin.execution.levels import UnpackableError, integer_levels
from lm_calib_plugin.quantization.grids import Grid

GROUPS = (32, 64, 128, 256)
MIDDLE = 8


class Int4WeightOnly(PackedLinear):
    """4-bit weights in groups, bfloat16 inputs; on CUDA, and on CPUs in bfloat16.

    Reads a quarter of the bytes, which pays for few tokens (generation); with many tokens the
    un-packing costs more than it saves.
    """

    kernel = "int4"
    number = "int"
    stored = ("packed", "scale_zero", "zero")

    def __init__(self, levels: Tensor, grid: Grid, bias: nn.Parameter | None) -> None:
        super().__init__(levels, bias, None)
        device = levels.device
        size = self.in_features // grid.scale.shape[1]
        self.group_size = size
        scale = grid.scale.to(device)
        zero = _middle(grid).to(device)
        both = torch.stack([scale, (MIDDLE - zero) * scale], dim=-1).transpose(0, 1)
        packed = _pack(levels)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale_zero", both.to(torch.bfloat16).contiguous(), persistent=False)
        whole = torch.equal(zero, zero.round())
        kept = zero.to(torch.int8) if whole else zero
        self.register_buffer("zero", kept, persistent=False)
        self.packed: Tensor
        self.scale_zero: Tensor
        self.zero: Tensor

    @classmethod
    def from_layer(cls, weight: Tensor, grid: Grid | None, bias: Any, activation: Any) -> Self:
        """Pack a weight that lies on a 4-bit integer grid whose scales are bfloat16 numbers."""
        packed = cls(_unsigned(weight, grid), grid, bias)  # type: ignore[arg-type]
        packed.weight_dtype = weight.dtype
        return packed

    @staticmethod
    def refusal(facts: Facts) -> str | None:
        """Return why the kernel cannot serve a layer, None if it can."""
        if facts.number != "int" or facts.bits != 4:
            return "serves 4-bit integer weights only"
        if facts.activation is not None:
            return "does not quantize inputs"
        if facts.group_size not in GROUPS:
            return f"needs group_size={' or '.join(map(str, GROUPS))}"
        if facts.dtype != torch.bfloat16:
            return "computes in bfloat16 (dtype=bfloat16)"
        if facts.device.kind == "cpu":
            if not has_op("aten._weight_int4pack_mm_for_cpu"):
                return f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu"
            return multiple_of(facts, 16, 32)
        if facts.device.capability is None or facts.device.capability < (8, 0):
            return "needs a CPU, or a CUDA device of capability 8.0 or newer"
        if not has_op("aten._weight_int4pack_mm"):
            return f"torch {torch.__version__} has no _weight_int4pack_mm"
        return multiple_of(facts, 8, 32)

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply input rows ``[tokens, in]``; bfloat16."""
        rows = rows.to(torch.bfloat16).contiguous()
        name = "_weight_int4pack_mm" + ("_for_cpu" if rows.device.type == "cpu" else "")
        op = getattr(torch.ops.aten, name)
        out: Tensor = op(rows, self.packed, self.group_size, self.scale_zero)
        return out if self.bias is None else out + self.bias

    @classmethod
    def emulate(
        cls, rows: Tensor, weight: Tensor, grid: Grid | None, bias: Tensor | None, activation: Any
    ) -> Tensor:
        """Round weights to bfloat16 as the kernel does, sum in float32, round to bfloat16."""
        q = _unsigned(weight, grid)
        assert grid is not None
        scale = grid.scale.to(torch.bfloat16).float()[..., None]
        zero = ((MIDDLE - _middle(grid)) * grid.scale).to(torch.bfloat16).float()[..., None]
        groups = (q - MIDDLE).reshape(len(q), scale.shape[1], -1).float()
        dense = (groups * scale + zero).to(torch.bfloat16).reshape(q.shape)
        out = (rows.to(torch.bfloat16).float() @ dense.float().t()).to(torch.bfloat16)
        return out if bias is None else out + bias.to(torch.bfloat16)

    def dense_weight(self) -> Tensor:
        """Return the weight ``[out, in]`` that was packed.

        The layer's answers to unit inputs tell the levels; the rest is the grid's own arithmetic.
        """
        bias, self.bias = self.bias, None
        try:
            units = identity_rows(self.in_features, self.packed.device, torch.bfloat16)
            answers = torch.cat([self.multiply(rows) for rows in units]).t().float()
        finally:
            self.bias = bias
        both = self.scale_zero.transpose(0, 1).float()
        scale, zero = both[..., :1], both[..., 1:]
        groups = answers.reshape(self.out_features, scale.shape[1], -1)
        q = ((groups - zero) / scale).round_().add_(MIDDLE)
        dense = (q - self.zero[..., None].float()) * scale
        return dense.reshape(self.out_features, self.in_features).to(self.weight_dtype)


def _unsigned(weight: Tensor, grid: Grid | None) -> Tensor:
    """Return ``q`` in 0..15, int32 ``[out, in]``."""
    assert grid is not None
    if not torch.equal(grid.scale.to(torch.bfloat16).float(), grid.scale):
        raise UnpackableError("scales are not bfloat16 numbers")
    levels = integer_levels(weight, grid)
    return levels + MIDDLE if getattr(grid, "symmetric", True) else levels


def _middle(grid: Grid) -> Tensor:
    """Return the ``q`` ``[out, groups]`` that stands for zero, float32."""
    if getattr(grid, "symmetric", True):
        return torch.full_like(grid.scale, float(MIDDLE))
    zero: Tensor = grid.zero  # type: ignore[attr-defined]
    return zero


def _pack(levels: Tensor) -> Tensor:
    """Bring levels 0..15 (int32, ``[out, in]``) into the order of the device's kernel."""
    if levels.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.contiguous(), 1)
    width = levels.shape[1]
    tiles = next(t for t in (8, 4, 2) if width % (16 * t) == 0)
    pairs = (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
