"""How the time of a compression grows with tokens, width and depth.

    OMP_NUM_THREADS=1 python benchmarks/growth.py OUT.json

Llama-shaped models of random weights and random tokens; one of the three is changed at a time.
CPU seconds of this process, so that other programs hardly count, over two plain forward passes of
the same tokens in the same process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import facts
from transformers import LlamaConfig, LlamaForCausalLM

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress

BASE = {"tokens": 4096, "width": 256, "depth": 4}
STEPS = {
    "tokens": [1024, 2048, 4096, 8192, 16384],
    "width": [128, 256, 512, 768],
    "depth": [2, 4, 8, 16],
}
LENGTH, VOCABULARY = 256, 256


def build(width: int, depth: int) -> Any:
    """Return a model of random weights: inner width three times the hidden one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config).eval()


def measured(method: str, tokens: int, width: int, depth: int) -> dict[str, Any]:
    """Return CPU seconds of a compression, and of two plain passes before and after it."""
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(VOCABULARY, (tokens // LENGTH, LENGTH), generator=generator)
    calibration = CalibrationSet.of(windows.tolist(), seqlen=LENGTH)
    model = build(width, depth)

    def passes() -> float:
        start = time.process_time()
        with torch.inference_mode():
            for part in windows.split(16):
                model.model(part, use_cache=False)
        return time.process_time() - start

    passes()
    plain = 2 * passes()
    runtime = Runtime(progress=False, report_dir=tempfile.mkdtemp())
    start = time.process_time()
    report = compress(model, None, Recipe(method=method, sparsity=0.5), runtime, calibration)
    spent = time.process_time() - start
    plain = (plain + 2 * passes()) / 2
    return {
        "cpu_seconds": round(spent, 3),
        "plain": round(plain, 3),
        "over_plain": spent / plain,
        "stages": {name: round(value, 3) for name, value in report.seconds.items()},
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", action="append")
    given = parser.parse_args()
    rows = []
    for method in given.method or ["wanda", "sparsegpt"]:
        measured(method, 1024, 128, 2)  # imports and caches do not count
        for what, steps in STEPS.items():
            for step in steps:
                sizes = {**BASE, what: step}
                row = {"method": method, "grows": what, **sizes, **measured(method, **sizes)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    given.out.write_text(json.dumps({"machine": facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
