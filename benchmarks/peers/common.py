"""What the scripts of all peers share: their arguments, and the model that they are given."""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM


def arguments(about: str | None, methods: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ``compression_time.py`` gives all peers the same options."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("method", choices=methods)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--blocks", type=int, default=0)
    parser.add_argument("--perplexity", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def load(given: argparse.Namespace) -> Any:
    """Return the model in float32, or its first blocks."""
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    if given.blocks:
        model.model.layers = model.model.layers[: given.blocks]
        model.config.num_hidden_layers = given.blocks
    return model


def timed(given: argparse.Namespace, work: Callable[[], Any]) -> dict[str, Any]:
    """Do the work; return its seconds (with ``--cpu`` those of the CPU), and the peak memory."""
    clock = time.process_time if given.cpu else time.perf_counter
    start = clock()
    work()
    return {
        "seconds": clock() - start,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def windows(given: argparse.Namespace) -> list[list[int]]:
    """Return the calibration windows."""
    found: list[list[int]] = json.loads(given.tokens.read_text())["calib"]
    return found
