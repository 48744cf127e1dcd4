"""CPU seconds of methods on a few blocks of one model, one after the other in one process.

    OMP_NUM_THREADS=1 python benchmarks/pruning_time.py MODEL TOKENS.json OUT.json \
        --blocks 8 11 --run sparsegpt --run swap_pcg --run 'swap_pcg;correction=0'

Other work on the machine does not count in CPU time, so the ratios hold on a busy one, too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress


def main() -> None:
    """Run the command line; the first run is what the others are compared with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, nargs=2, default=[8, 11])
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--run", action="append", required=True, metavar="METHOD[;KEY=VALUE...]")
    given = parser.parse_args()
    windows = json.loads(given.tokens.read_text())["calib"]
    calibration = CalibrationSet.of(windows, seqlen=max(map(len, windows)))
    rows = []
    for run in given.run:
        method, *options = run.split(";")
        fields = dict(option.split("=", 1) for option in options)
        recipe = Recipe(method=method, sparsity=given.sparsity, **fields)
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        model.model.layers = model.model.layers[given.blocks[0] : given.blocks[1]]
        model.config.num_hidden_layers = len(model.model.layers)
        runtime = Runtime(progress=False, report_dir=tempfile.mkdtemp())
        start = time.process_time()
        compress(model, None, recipe, runtime, calibration)
        seconds = time.process_time() - start
        first = rows[0]["cpu_seconds"] if rows else seconds
        rows.append({"run": run, "cpu_seconds": round(seconds, 1), "ratio": seconds / first})
        print(rows[-1], flush=True)
    found = {"blocks": given.blocks, "threads": torch.get_num_threads(), "rows": rows}
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
