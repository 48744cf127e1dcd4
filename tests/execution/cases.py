"""Layers on grids for every kernel, and slow formulations of what they compute."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.execution import (
    Activation,
    FP8Linear,
    Int4WeightOnly,
    Int8CPULinear,
    Int8Linear,
    PackedLinear,
    SemiSparseLinear,
)
from lm_calib_plugin.execution.facts import Device, Facts
from lm_calib_plugin.quantization.grids import GridSpec, IntegerGrid

OUT, WIDTH = 64, 256
BF16 = torch.bfloat16


def single(value: float) -> float:
    """Round to the nearest float32; a quotient of two of these, in float64 before, stays right."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """A kernel, and a layer that it serves."""

    kernel: type[PackedLinear]
    dtype: torch.dtype
    spec: GridSpec | None
    activation: Activation | None = None
    pattern: str | None = None

    def weight(self, out: int = OUT, width: int = WIDTH, seed: int = 1) -> tuple[Tensor, Any]:
        """A weight as it is evaluated, and its grid."""
        weight = normal(out, width, seed=seed) / width**0.5
        if self.spec is None:
            quads = weight.reshape(out, -1, 4)
            quads.scatter_(-1, quads.abs().topk(2, largest=False).indices, 0.0)
            return quads.reshape(out, width).to(self.dtype), None
        grid = self.spec.fit(weight, self.dtype)
        return grid.round(weight).to(self.dtype), grid

    def inputs(self, tokens: int = 33, width: int = WIDTH, seed: int = 2) -> Tensor:
        rows = normal(tokens, width, seed=seed)
        rows[:, 3] *= 20
        rows[0] = 0
        return rows.to(self.dtype)

    def facts(self, device: Device, shape: tuple[int, int] = (OUT, WIDTH)) -> Facts:
        spec = self.spec or GridSpec(bits=16, group_size=-1)
        number = self.spec and self.spec.number
        levels = (number, spec.bits, spec.group_size, spec.symmetric)
        return Facts(device, self.dtype, shape, *levels, self.activation, self.pattern)


W8, W4 = GridSpec("int", 8, -1), GridSpec("int", 4, -1)
FP8 = GridSpec("fp8", 8, -1)
STATIC = Activation("int", 8, False, 0.05)
CASES = {
    "fp8": Case(FP8Linear, BF16, FP8, Activation("fp8", 8)),
    "fp8_static": Case(FP8Linear, BF16, FP8, Activation("fp8", 8, False, 0.02)),
    "int8": Case(Int8Linear, torch.float32, W8, Activation()),
    "int8_static": Case(Int8Linear, torch.float32, W8, STATIC),
    "int8_bf16": Case(Int8Linear, BF16, W8, Activation()),
    "w4a8": Case(Int8Linear, torch.float32, W4, Activation()),
    "w4a4": Case(Int8Linear, torch.float32, W4, Activation(bits=4)),
    "int8_cpu": Case(Int8CPULinear, torch.float32, W8, Activation()),
    "int8_cpu_static": Case(Int8CPULinear, torch.float32, W8, STATIC),
    "int8_cpu_bf16": Case(Int8CPULinear, BF16, W8, Activation()),
    "w4a4_cpu": Case(Int8CPULinear, torch.float32, W4, Activation(bits=4)),
    "int4_g32": Case(Int4WeightOnly, BF16, GridSpec("int", 4, 32)),
    "int4_g128": Case(Int4WeightOnly, BF16, GridSpec("int", 4, 128)),
    "int4_asymmetric": Case(Int4WeightOnly, BF16, GridSpec("int", 4, 64, symmetric=False)),
    "2:4": Case(SemiSparseLinear, BF16, None, None, "2:4"),
}
HOPPER = Device("cuda", (9, 0))


def slow_integer(rows: Tensor, weight: Tensor, grid: IntegerGrid, activation: Activation) -> Tensor:
    """Whole numbers and fractions of Python, one product at a time; float64."""
    highest = 2 ** (activation.bits - 1)
    out = torch.zeros(len(rows), len(weight), dtype=torch.float64)
    levels = [
        [round(float(w) / float(scale)) for w in row]
        for row, scale in zip(weight, grid.scale, strict=True)
    ]
    for t, row in enumerate(rows.float()):
        scale = Fraction(single(float(row.abs().max()) / (highest - 0.5))) or Fraction(1)
        if activation.scale is not None:
            scale = Fraction(single(activation.scale))
        # The largest value is near the middle of two levels, where the last bit decides; Python
        # rounds to the even one, too.
        places = [single(x / float(scale)) for x in row.tolist()]
        given = [min(max(round(place), -highest), highest - 1) for place in places]
        for o, line in enumerate(levels):
            total = sum(a * b for a, b in zip(given, line, strict=True))
            out[t, o] = total * float(scale) * float(grid.scale[o, 0])
    return out
