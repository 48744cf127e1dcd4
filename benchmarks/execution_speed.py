"""Time low-precision kernels against the dense layer, per shape and number of tokens.

usage: python benchmarks/execution_speed.py [--device cpu|cuda] [--json FILE]

On a CPU the shapes are small and operators that the package does not use stand beside those it
does, as the grounds of the choice; on CUDA the shapes are those of an 8-billion Llama. Each number
is a median of calls by turns, dense and packed; ``ratio`` above 1 means the kernel is faster.
Inputs are quantized inside the time that is taken. One thread: set ``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.execution import KERNELS, Activation, Device, Facts, PackedLinear
from lm_calib_plugin.execution.base import simulated
from lm_calib_plugin.execution.choose import _failed_fusions, race
from lm_calib_plugin.execution.levels import quantize_rows
from lm_calib_plugin.quantization.grids import GridSpec, IntegerGrid

SHAPES = {
    "cpu": ((2048, 2048), (576, 1536), (1536, 576)),
    "cuda": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
}
TOKENS = {"cpu": (1, 16, 128, 512), "cuda": (1, 16, 512, 4096)}
# name -> levels of the weights, inputs, pattern
SCHEMES: dict[str, tuple[GridSpec | None, Activation | None, str | None]] = {
    "FP8": (GridSpec("fp8", 8, -1), Activation("fp8", 8), None),
    "W8A8": (GridSpec("int", 8, -1), Activation(), None),
    "W4A16": (GridSpec("int", 4, 64), None, None),
    "2:4": (None, None, "2:4"),
}


def evaluated(spec: GridSpec | None, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Bring a random weight to its levels, or to the 2:4 pattern."""
    if spec is None:
        quads = weight.reshape(len(weight), -1, 4).clone()
        quads.scatter_(-1, quads.abs().topk(2, largest=False).indices, 0.0)
        return quads.reshape(weight.shape).to(dtype), None
    grid = spec.fit(weight, dtype)
    return grid.round(weight).to(dtype), grid


def rows_of(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Yield one row per kernel that serves, shape and number of tokens."""
    own = torch.Generator().manual_seed(0)
    for out, width in SHAPES[device]:
        dense = torch.randn(out, width, generator=own) / width**0.5
        for scheme, (spec, activation, pattern) in SCHEMES.items():
            weight, grid = evaluated(spec, dense.to(device), dtype)
            facts = facts_of(spec, activation, pattern, weight)
            for kernel in (k for k in KERNELS if k.refusal(facts) is None):
                packed = kernel.from_layer(weight, grid, None, activation)
                for tokens in TOKENS[device]:
                    x = torch.randn(tokens, width, generator=own).to(device, dtype)
                    yield {
                        "scheme": scheme,
                        "kernel": kernel.kernel,
                        **timed(weight, packed, x),
                        **error(weight, activation, packed, x),
                    }
                    print(".", end="", flush=True)


def facts_of(
    spec: GridSpec | None, activation: Activation | None, pattern: str | None, weight: Tensor
) -> Facts:
    shape = (weight.shape[0], weight.shape[1])
    common = (Device.of(weight.device), weight.dtype, shape)
    if spec is None:
        return Facts(*common, None, activation=activation, pattern=pattern)
    levels = (spec.number, spec.bits, spec.group_size, spec.symmetric)
    return Facts(*common, *levels, activation, pattern)


def timed(weight: Tensor, packed: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Any]:
    found = race(lambda rows: nn.functional.linear(rows, weight), packed, x)
    return {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "tokens": len(x),
        "dense_ms": round(1e3 * found.dense, 4),
        "packed_ms": round(1e3 * found.packed, 4),
        "ratio": round(found.ratio, 3),
    }


def error(
    weight: Tensor, activation: Activation | None, packed: PackedLinear, x: Tensor
) -> dict[str, float]:
    wanted = simulated(x, weight, None, activation).double()
    distance = (packed(x).double() - wanted).norm() / wanted.norm()
    return {"relative_error": float(f"{float(distance):.3g}")}


def others() -> Iterator[dict[str, Any]]:
    """Yield rows of CPU operators that are not used: other numerics, or slower."""
    own = torch.Generator().manual_seed(0)
    for out, width in SHAPES["cpu"]:
        dense = torch.randn(out, width, generator=own) / width**0.5
        grid = GridSpec("int", 8, -1).fit(dense)
        assert isinstance(grid, IntegerGrid)
        weight = grid.round(dense)
        levels = (weight / grid.scale).round().to(torch.int8)
        zeros = torch.zeros(out, dtype=torch.int64)
        scales = grid.scale[:, 0].double()
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        fbgemm = torch.ops.quantized.linear_prepack(quantized, None)

        def dynamic(x: Tensor, packed: Any = fbgemm) -> Tensor:
            return torch.ops.quantized.linear_dynamic(x, packed, False)

        def int_mm(x: Tensor, levels: Tensor = levels, scale: Tensor = grid.scale) -> Tensor:
            q, s = quantize_rows(x, Activation())
            return torch._int_mm(q, levels.t()).float() * s * scale.t()

        for tokens in TOKENS["cpu"]:
            x = torch.randn(tokens, width, generator=own)
            wanted = simulated(x, weight, None, Activation()).double()
            for name, run in (("fbgemm linear_dynamic", dynamic), ("_int_mm", int_mm)):
                distance = float((run(x).double() - wanted).norm() / wanted.norm())
                row = {"operator": name, **timed(weight, run, x)}
                yield {**row, "relative_error": float(f"{distance:.3g}")}


def machine(device: str) -> dict[str, Any]:
    """Return what a reader has to know of the machine."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": str(Device.of(device)),
        # Of all programs; far above the number of threads, ratios are good for their order only.
        "load": round(os.getloadavg()[0], 1),
    }
    if device == "cuda":
        return facts | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    model = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x[:10] == "model name"]
    return facts | {"cpu": model[0].split(": ")[1] if model else "", "cores": os.cpu_count()}


def main() -> None:
    """Time everything that runs here, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=there)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    dtypes = (torch.float32, torch.bfloat16) if given.device == "cpu" else (torch.bfloat16,)
    with torch.no_grad():
        found = [row for dtype in dtypes for row in rows_of(given.device, dtype)]
        result = {"machine": machine(given.device), "kernels": found, "notes": _failed_fusions()}
        if given.device == "cpu":
            result["not_used"] = list(others())
    print()
    lines = [json.dumps(row) for row in (*found, *result.get("not_used", ()))]
    print("\n".join(lines))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
