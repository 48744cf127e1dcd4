"""Measure this package on fixed calibration windows, in the format of ``naive.py``.

usage: python benchmarks/product.py MODEL TOKENS.json METHOD [key=value ...] [--json FILE]
           [--against FOLDER]

Perplexities are those of ``perplexity.py`` on the windows of the tokens file. ``--against`` names
a folder of weights written by ``naive.py --out``; the share of equal masks (or, after
quantization, of equal levels) is added.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from perplexity import perplexities
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress


def agreement(model: torch.nn.Module, path: Path) -> dict[str, float]:
    """Compare with stored weights: share of equal zero patterns and relative distance."""
    other = load_file(path)
    same, total, distance, norm = 0, 0, 0.0, 0.0
    for name, parameter in model.named_parameters():
        if name in other:
            mine, theirs = parameter.detach().float(), other[name].float()
            same += int(((mine == 0) == (theirs == 0)).sum())
            total += mine.numel()
            distance += float((mine - theirs).square().sum())
            norm += float(theirs.square().sum())
    return {"zeros_agree": same / total, "relative_distance": (distance / norm) ** 0.5}


def main() -> None:
    """Compress once, score, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("method")
    parser.add_argument("options", nargs="*", help="recipe fields, key=value")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    tokens = json.loads(given.tokens.read_text())
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    fields: dict[str, Any] = dict(option.split("=", 1) for option in given.options)
    recipe = Recipe(method=given.method, **{"heldout": 0, **fields})
    seqlen = max(map(len, tokens["calib"]))
    calibration = CalibrationSet.of(tokens["calib"], seqlen=seqlen)
    if not recipe.needs_data:
        calibration = None
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = compress(model, None, recipe, Runtime(report_dir=folder), calibration)
    seconds = time.perf_counter() - start
    line: dict[str, Any] = {
        "model": Path(given.model).name,
        "method": given.method,
        "options": fields,
        "key": report.key,
        "seconds": round(seconds, 1),
        "stages": {k: round(v, 1) for k, v in report.seconds.items()},
        "peak_memory_gib": report.peak_memory_gib,
        "achieved": report.achieved,
        "error": report.error(),
        "warnings": report.warnings,
        "perplexity": perplexities(model, tokens["evals"]),
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if given.against:
        line["against_naive"] = agreement(model, given.against)
    print(json.dumps(line))
    if given.json:
        before = json.loads(given.json.read_text()) if given.json.exists() else []
        given.json.write_text(json.dumps([*before, line], indent=1) + "\n")


if __name__ == "__main__":
    main()
