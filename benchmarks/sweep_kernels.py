"""Time the sweeps of SparseGPT and GPTQ over the layers of Llama-3.1-8B, kernels against torch.

    OMP_NUM_THREADS=1 python benchmarks/sweep_kernels.py OUT.json [--scale 0.05] [--repeats 5]

Runs on CUDA where there is a device, with kernels checked against float64 first, else on the CPU,
where there is the path in torch only (``--scale`` multiplies the sides of all matrices). A number
is the median over repeats of the sweep of one layer, the factor of its Gram matrix given; the
factor stands beside it. Floors: ``bytes`` is what has to pass memory once (weights read and
written, errors written and read, the factor read) over the copy rate measured in the same run;
``flops`` are those of the products and of the sweep over the rate of a float32 product.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import copy_rate, facts, matmul_rate, seconds
from torch import Tensor

from lm_calib_plugin import kernels
from lm_calib_plugin.kernels import sweeps
from lm_calib_plugin.pruning.obs import sweep
from lm_calib_plugin.pruning.parts import BLOCK, Strength
from lm_calib_plugin.quantization.grids import GridSpec
from lm_calib_plugin.quantization.rounding import gptq
from lm_calib_plugin.statistics import InverseFactor, inverse_factor

sys.path.append(str(Path(__file__).parents[1]))

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
# How often a shape occurs in one block of the model: q and o; k and v; gate and up; down.
COUNTS = (2, 2, 2, 1)
BLOCKS = 32


def floors(rows: int, width: int, rate: dict[str, float]) -> dict[str, float]:
    """Return seconds below which no sweep of a layer can come."""
    # Each of the blocks brings all columns behind it up to date: those are read and written.
    passes = (width // BLOCK + 1) / 2
    moved = 4 * (rows * width * (2 * passes + 4) + width**2 / 2)
    return {"bytes": moved / rate["bytes"], "flops": rows * width**2 / rate["flops"]}


def runs(weight: Tensor, factor: InverseFactor) -> dict[str, Callable[[], Any]]:
    """Return the sweeps by name."""
    columns, order = weight.t().contiguous(), torch.arange(len(factor.upper)).to(weight.device)
    found: dict[str, Callable[[], Any]] = {
        "sparsegpt 50%": lambda: sweep(weight, factor, Strength(0.5)),
        "sparsegpt 2:4": lambda: sweep(weight, factor, Strength(0.5, (2, 4))),
    }
    for name, symmetric in (("gptq 4 bits", True), ("gptq 4 bits, asymmetric", False)):
        grid = GridSpec("int", 4, 128, symmetric).fit(weight)
        found[name] = lambda g=grid: gptq._sweep(columns.clone(), factor.upper, g, order, None)
    return found


def checked(device: str) -> dict[str, str]:
    """Compare the kernels with a loop in float64; raise where one is wrong."""
    from tests.kernels.checks import cases

    for check in cases().values():
        check(device, True)
    return dict.fromkeys(cases(), "equal to float64")


def measured(device: str, scale: float, repeats: int) -> list[dict[str, Any]]:
    """Return a row for every shape, sweep and path."""
    own = torch.Generator().manual_seed(0)
    size = max(256, int(8192 * min(1.0, scale * 2)))
    rate = {"bytes": copy_rate(device), "flops": matmul_rate(torch.float32, device, size)}
    rows = []
    for shape, count in zip(SHAPES, COUNTS, strict=True):
        out, width = (max(BLOCK, int(side * scale) // BLOCK * BLOCK) for side in shape)
        inputs = torch.randn(2 * width, width, generator=own).to(device)
        gram = inputs.t() @ inputs
        weight = (torch.randn(out, width, generator=own) / width**0.5).to(device)
        factor = inverse_factor(gram, 0.01)
        factoring = seconds(lambda g=gram: inverse_factor(g, 0.01), repeats)
        paths = ("kernel", "torch") if kernels.compiled_on(weight) else ("torch",)
        for name, work in runs(weight, factor).items():
            took = {}
            for path in paths:
                automatic = sweeps.compiled_on
                sweeps.compiled_on = lambda tensor, p=path: p == "kernel"
                try:
                    took[path] = seconds(work, repeats)
                finally:
                    sweeps.compiled_on = automatic
            row = {"shape": [out, width], "in_a_block": count, "sweep": name, "seconds": took}
            rows.append({**row, "factor": factoring, "floor": floors(out, width, rate)})
            print(json.dumps(rows[-1]), flush=True)
    return [{"rate": rate}, *rows]


def whole(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Add up the sweeps of all blocks of the model, by sweep and path."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for path, took in row["seconds"].items():
            of = found.setdefault(row["sweep"], {})
            of[path] = of.get(path, 0.0) + BLOCKS * row["in_a_block"] * took
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="sides of matrices, times this")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = kernels.compiled_on(torch.zeros(1, device=device))
    said = checked(device) if compiled else {}
    rate, *rows = measured(device, given.scale, given.repeats)
    found = {"machine": facts(), "scale": given.scale, "checks": said, **rate, "rows": rows}
    found["seconds_of_all_sweeps"] = whole(rows)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["seconds_of_all_sweeps"], indent=1))


if __name__ == "__main__":
    main()
