"""Seconds of several cells of a leaderboard, with shared statistics and without, in one run.

    OMP_NUM_THREADS=1 python benchmarks/shared_statistics.py MODEL file:TEXT.jsonl OUT.json \
        [--nsamples 16] [--seqlen 256] [--cell 'wanda;sparsity=0.3' ...]

Every cell begins with a copy of one dense model in memory; loading and copying do not count. Cells
without sharing come first, then the same cells with it. ``alone`` and ``shared`` are seconds of a
cell and of its stages; the ratio of the sums is what counts. The weights of both must be the same
bits, else nothing is written.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_calib_plugin import Recipe, Report, Runtime, compress
from lm_calib_plugin.engine import shared_statistics

CELLS = (
    "wanda;sparsity=0.3",
    "wanda;sparsity=0.5",
    "wanda;pattern=2:4",
    "sparsegpt;sparsity=0.5",
    "sparsegpt;pattern=2:4",
)


def cell(text: str, given: argparse.Namespace) -> Recipe:
    """Return the recipe of a cell, ``METHOD;FIELD=VALUE...``."""
    method, *options = text.split(";")
    fields = dict(option.split("=", 1) for option in options)
    return Recipe.from_model_args(
        {
            "method": method,
            "propagate": "dense",
            "calibration": given.calibration,
            "nsamples": given.nsamples,
            "seqlen": given.seqlen,
            **fields,
        }
    )


def timed(base: Any, tokenizer: Any, recipe: Recipe) -> tuple[float, Report]:
    """Return the seconds of one compression, and its report."""
    model = copy.deepcopy(base)
    runtime = Runtime(progress=False, report_dir=tempfile.mkdtemp())
    start = time.perf_counter()
    report = compress(model, tokenizer, recipe, runtime)
    return time.perf_counter() - start, report


def machine() -> dict[str, Any]:
    """Return what a reader has to know of the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Of all programs; far above the number of threads, ratios are good for their order only.
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("out", type=Path)
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--cell", action="append", metavar="METHOD[;FIELD=VALUE...]")
    given = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    names = given.cell or CELLS
    found: dict[str, list[tuple[float, Report]]] = {}
    held = 0
    for way in ("alone", "shared"):
        with shared_statistics() if way == "shared" else nullcontext() as shared:
            found[way] = []
            for name in names:
                found[way].append(timed(base, tokenizer, cell(name, given)))
                print(way, name, f"{found[way][-1][0]:.1f} s", flush=True)
            held = 0 if shared is None else shared.bytes
    rows = []
    for name, one, other in zip(names, found["alone"], found["shared"], strict=True):
        if one[1].weights_digest != other[1].weights_digest:
            raise SystemExit(f"{name}: other weights with shared statistics")
        row: dict[str, Any] = {"cell": name, "weights": one[1].weights_digest}
        for way, (seconds, report) in (("alone", one), ("shared", other)):
            stages = {stage: round(s, 2) for stage, s in report.seconds.items()}
            row[way] = {"seconds": round(seconds, 2), "stages": stages}
        rows.append(row)
    sums = {way: sum(seconds for seconds, _ in done) for way, done in found.items()}
    result = {
        "model": Path(given.model).name,
        "calibration": {"nsamples": given.nsamples, "seqlen": given.seqlen},
        "cells": rows,
        "seconds": {way: round(total, 1) for way, total in sums.items()},
        "ratio": round(sums["alone"] / sums["shared"], 2),
        "held_mib": round(held / 2**20, 1),
        "machine": machine(),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"ratio {result['ratio']}")


if __name__ == "__main__":
    main()
