"""Seconds of several cells of a leaderboard, with shared statistics and without, in one run.

    OMP_NUM_THREADS=1 python benchmarks/shared_statistics.py MODEL file:TEXT.jsonl OUT.json \
        [--nsamples 16] [--seqlen 256] [--cells ten] [--cell 'wanda;sparsity=0.3' ...] \
        [--blocks 8 14]

Every cell begins with a copy of one dense model in memory; loading and copying do not count. Cells
without sharing come first, then the same cells with it, for which the kinds of statistics of all
cells are declared. ``alone`` and ``shared`` are seconds of a cell and of its stages. Two ratios
count: all cells alone over all cells shared, and all cells shared over the slowest cell alone. The
weights of both must be the same bits, else nothing is written. With ``--blocks`` only these blocks
of the model are left.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import machine
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_calib_plugin import Recipe, Report, Runtime, compress
from lm_calib_plugin.engine import kind_of, shared_statistics

CELLS = {
    "five": (
        "wanda;sparsity=0.3",
        "wanda;sparsity=0.5",
        "wanda;pattern=2:4",
        "sparsegpt;sparsity=0.5",
        "sparsegpt;pattern=2:4",
    ),
    "ten": (
        "wanda;sparsity=0.3",
        "wanda;sparsity=0.5",
        "wanda;sparsity=0.7",
        "wanda;pattern=2:4",
        "sparsegpt;sparsity=0.5",
        "sparsegpt;sparsity=0.6",
        "sparsegpt;pattern=2:4",
        "gptq;bits=3;group_size=64",
        "gptq;bits=4;group_size=64",
        "rtn;bits=4;group_size=64",
    ),
}


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


def timed(base: Any, tokenizer: Any, recipe: Recipe) -> tuple[float, float, Report]:
    """Return the seconds of one compression, by the wall and of the CPU, and its report."""
    model = copy.deepcopy(base)
    runtime = Runtime(progress=False, report_dir=tempfile.mkdtemp())
    start, cpu = time.perf_counter(), time.process_time()
    report = compress(model, tokenizer, recipe, runtime)
    return time.perf_counter() - start, time.process_time() - cpu, report


def facts(seconds: float, cpu: float, report: Report) -> dict[str, Any]:
    """Return the seconds of a cell by stage; ``rest`` is what belongs to none."""
    stages = {stage: round(s, 2) for stage, s in report.seconds.items()}
    stages["rest"] = round(seconds - sum(report.seconds.values()), 2)
    return {"seconds": round(seconds, 2), "cpu": round(cpu, 2), "stages": stages}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("out", type=Path)
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--cells", choices=CELLS, default="five")
    parser.add_argument("--cell", action="append", metavar="METHOD[;FIELD=VALUE...]")
    parser.add_argument("--blocks", type=int, nargs=2)
    given = parser.parse_args()
    base: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    if given.blocks:
        base.model.layers = base.model.layers[slice(*given.blocks)]
        base.config.num_hidden_layers = len(base.model.layers)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    names = given.cell or CELLS[given.cells]
    recipes = [cell(name, given) for name in names]
    kinds = {kind_of(recipe.make_method()) for recipe in recipes} - {None}
    found: dict[str, list[tuple[float, float, Report]]] = {}
    held = 0
    for way in ("alone", "shared"):
        context = shared_statistics(kinds=kinds) if way == "shared" else nullcontext()  # type: ignore[arg-type]
        with context as shared:
            found[way] = []
            for name, recipe in zip(names, recipes, strict=True):
                found[way].append(timed(base, tokenizer, recipe))
                print(way, name, facts(*found[way][-1]), flush=True)
            held = 0 if shared is None else shared.bytes
    rows = []
    for name, one, other in zip(names, found["alone"], found["shared"], strict=True):
        if one[2].weights_digest != other[2].weights_digest:
            raise SystemExit(f"{name}: other weights with shared statistics")
        ways = {"alone": facts(*one), "shared": facts(*other)}
        rows.append({"cell": name, "weights": one[2].weights_digest, **ways})
    sums = {way: sum(seconds for seconds, _, _ in done) for way, done in found.items()}
    slowest = max(range(len(names)), key=lambda n: found["alone"][n][0])
    result = {
        "model": Path(given.model).name,
        "blocks": given.blocks,
        "calibration": {"nsamples": given.nsamples, "seqlen": given.seqlen},
        "cells": rows,
        "seconds": {way: round(total, 1) for way, total in sums.items()},
        "ratio": round(sums["alone"] / sums["shared"], 2),
        "slowest_alone": names[slowest],
        "shared_over_slowest_alone": round(sums["shared"] / found["alone"][slowest][0], 2),
        "held_mib": round(held / 2**20, 1),
        "machine": machine.facts(),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"alone / shared: {result['ratio']}")
    print(f"all shared / {names[slowest]} alone: {result['shared_over_slowest_alone']}")


if __name__ == "__main__":
    main()
