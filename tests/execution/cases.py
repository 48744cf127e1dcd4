"""Layers on grids for every kernel, and slow formulations of what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
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
from lm_calib_plugin.quantization.grids import Grid, GridSpec, IntegerGrid

OUT, WIDTH = 64, 256
BF16 = torch.bfloat16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fp8_grid(weight: Tensor) -> Grid:
    """A scale per row and e4m3 levels; only what a kernel reads of a grid."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / 448).to(BF16).float()
    return SimpleNamespace(scale=scale, group_size=weight.shape[1])  # type: ignore[return-value]


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
        if self.spec.number == "fp8":
            grid = fp8_grid(weight)
            levels = (weight / grid.scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            return (levels * grid.scale).to(self.dtype), grid
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
    """Whole numbers of Python, one product at a time; float64."""
    highest = 2 ** (activation.bits - 1)
    out = torch.zeros(len(rows), len(weight), dtype=torch.float64)
    levels = [
        [round(float(w) / float(scale)) for w in row]
        for row, scale in zip(weight, grid.scale, strict=True)
    ]
    for t, row in enumerate(rows.float()):
        largest = row.abs().max()
        scale = largest / (highest - 0.5) if activation.dynamic else torch.tensor(activation.scale)
        scale = scale if scale > 0 else torch.tensor(1.0)
        given = [min(max(round(float(x / scale)), -highest), highest - 1) for x in row]
        for o, line in enumerate(levels):
            total = sum(a * b for a, b in zip(given, line, strict=True))
            out[t, o] = total * float(scale) * float(grid.scale[o, 0])
    return out
