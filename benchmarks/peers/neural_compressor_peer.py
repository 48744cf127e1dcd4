"""neural-compressor's GPTQ on calibration tokens made before: one JSON line of seconds.

    PYTHON benchmarks/peers/neural_compressor_peer.py gptq MODEL tokens.json [--blocks N]

For an environment of its own (``neural-compressor[pt]`` 3.10): preparing, running the sequences and
converting, without loading. 3 bits in groups of 64, as ours.
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
from neural_compressor.torch.quantization import GPTQConfig, convert, prepare
from transformers import AutoModelForCausalLM


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
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    if given.blocks:
        model.model.layers = model.model.layers[: given.blocks]
        model.config.num_hidden_layers = given.blocks
    rows = json.loads(given.tokens.read_text())["calib"]
    start = clock()
    model = prepare(model, GPTQConfig(bits=3, group_size=64, use_sym=True))
    for row in rows:
        model(torch.tensor([row]))
    convert(model)
    found = {
        "seconds": clock() - start,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
