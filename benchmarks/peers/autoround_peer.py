"""auto-round on calibration tokens made before: one JSON line of seconds.

    PYTHON benchmarks/peers/autoround_peer.py 'autoround;bits=3;...' MODEL tokens.json [--blocks N]

For an environment of its own (auto-round 0.16.1). Runs the same number of steps with as many
sequences a step as ours does by ``rounding=autoround?iters=20&batch=8``; seconds without loading
and saving.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, BATCH = 20, 8


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method")
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--blocks", type=int, default=0)
    parser.add_argument("--perplexity", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    clock = time.process_time if given.cpu else time.perf_counter
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    if given.blocks:
        model.model.layers = model.model.layers[: given.blocks]
        model.config.num_hidden_layers = given.blocks
    rows = json.loads(given.tokens.read_text())["calib"]
    data = [
        {"input_ids": torch.tensor([r]), "attention_mask": torch.ones(1, len(r)).long()}
        for r in rows
    ]
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(given.model),
        bits=3,
        group_size=64,
        sym=True,
        iters=STEPS,
        nsamples=len(rows),
        seqlen=len(rows[0]),
        batch_size=BATCH,
        dataset=data,
        device_map="cpu",
        enable_torch_compile=False,
        # In float32, as ours: by default it computes in bfloat16, which is faster on some CPUs.
        amp=False,
    )
    start = clock()
    rounding.quantize()
    row = {
        "seconds": clock() - start,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
