"""Compression of a full-size model with random weights on one GPU: seconds, peak memory, floors.

    python benchmarks/full_size.py OUT.json                       # one H100: the Llama-3.1-8B shape
    python benchmarks/full_size.py OUT.json --scale 0.03125       # the same on a CPU, 1/32 as wide

Timings of a full-size model need no real weights: what is done does not depend on them, but for
methods that stop by themselves (swap_pcg), which is said in the row. The model is built on the
device from its configuration. Before anything is timed, the kernels of the device are checked
against float64 on one layer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import copy_rate, facts, floors, matmul_rate, seconds
from transformers import LlamaConfig, LlamaForCausalLM

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress
from lm_calib_plugin.pruning.obs import sweep
from lm_calib_plugin.pruning.parts import Strength
from lm_calib_plugin.statistics import Gram, inverse_factor

# Method -> (fields, seconds that were aimed at on one H100)
RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "wanda": ({"sparsity": 0.5}, 30),
    "sparsegpt": ({"sparsity": 0.5}, 90),
    "gptq": ({"bits": 4, "group_size": 128}, 90),
    "swap_pcg": ({"sparsity": 0.5}, 300),
}


def config(scale: float, depth: int) -> LlamaConfig:
    """Return the Llama-3.1-8B shape, or one ``scale`` times as wide."""
    heads = max(1, round(32 * scale))
    return LlamaConfig(
        vocab_size=128256 if scale == 1 else 512,
        hidden_size=128 * heads,
        intermediate_size=128 * max(1, round(112 * scale)),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=max(1, round(8 * scale)),
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )


def build(shape: LlamaConfig, device: str) -> Any:
    """Return a bfloat16 model of random weights, made on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(shape).eval()
    finally:
        torch.set_default_dtype(before)


def checked(device: str, width: int) -> float:
    """Return the largest relative difference of one sweep from plain float64 steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * width, width, generator=generator)
    weight = torch.randn(64, width, generator=generator)
    stats = Gram(width, device)
    stats.update(x.to(device))
    factor = inverse_factor(stats.gram(), 0.01)
    found, keep = sweep(weight.to(device), factor, Strength(0.5))
    upper, w = factor.upper.double().cpu(), weight.double()
    mask = keep.cpu()
    for i in range(width):
        error = torch.where(mask[:, i], 0.0, w[:, i]) / upper[i, i]
        w[:, i:] -= torch.outer(error, upper[i, i:])
    w *= mask
    return float((found.double().cpu() - w).norm() / w.norm())


def sweep_alone(shape: LlamaConfig, device: str) -> float:
    """Return the seconds that the sweeps of all layers of a model take, factors given."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    keys = shape.head_dim * shape.num_key_value_heads
    sizes = {hidden: [hidden, keys, keys, hidden, inner, inner], inner: [hidden]}
    total = 0.0
    for width, heights in sizes.items():
        upper = torch.eye(width, device=device) + 0.01 * torch.randn(
            width, width, device=device
        ).triu(1)
        dead = torch.zeros(width, dtype=torch.bool, device=device)
        factor = type(inverse_factor(torch.eye(4), 0.01))(upper, 0.01, dead)
        for height in heights:
            weight = torch.randn(height, width, device=device)
            strength = Strength(0.5)
            total += seconds(lambda w=weight, f=factor, s=strength: sweep(w, f, s), repeats=3)
    return total * shape.num_hidden_layers


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--run", action="append", choices=list(RUNS))
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = config(given.scale, given.depth)
    difference = checked(device, 512)
    print("sweep against float64:", difference, flush=True)
    if difference > 1e-3:
        raise SystemExit("the sweep of this device is wrong: nothing is timed")
    flops, bandwidth = matmul_rate(torch.bfloat16, device), copy_rate(device)
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(shape.vocab_size, (given.nsamples, given.seqlen), generator=generator)
    calibration = CalibrationSet.of(windows.tolist(), seqlen=given.seqlen)
    rows: list[dict[str, Any]] = []
    alone = sweep_alone(shape, device)
    print("sweeps of all layers, alone:", alone, flush=True)
    for method in given.run or RUNS:
        model = build(shape, device)
        size = sum(p.numel() * p.element_size() for p in model.model.layers.parameters())
        fields, aim = RUNS[method]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        runtime = Runtime(progress=False, report_dir=tempfile.mkdtemp())
        recipe = Recipe.from_model_args({"method": method, **fields})
        start = time.perf_counter()
        report = compress(model, None, recipe, runtime, calibration)
        spent = time.perf_counter() - start
        least = floors(shape, windows.numel(), given.seqlen, size, flops, bandwidth)
        row = {
            "method": method,
            "fields": fields,
            "seconds": spent,
            "aim": aim if given.scale == 1 else None,
            "stages": {name: round(value, 2) for name, value in report.seconds.items()},
            "floors": least,
            "over_floor": spent / sum(least.values()),
        }
        if device == "cuda":
            row["peak_gib_beyond_model"] = (
                torch.cuda.max_memory_allocated()
                - sum(p.numel() * p.element_size() for p in model.parameters())
            ) / 2**30
        rows.append(row)
        print(json.dumps(row), flush=True)
        del model
    found = {
        "machine": facts(),
        "shape": shape.to_diff_dict(),
        "rates": {"flops": flops, "bandwidth": bandwidth},
        "sweep_against_float64": difference,
        "sweeps_alone": alone,
        "rows": rows,
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
