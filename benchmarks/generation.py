"""Measure how fast this package writes text, against ``model.generate``, in one run.

usage: python benchmarks/generation.py MODEL [--batch N ...] [--tokens N] [--pairs N]
           [--dtype float32] [--device cpu] [--json FILE]

Both sides continue the same prefixes of two tokens by exactly the same number of tokens (end
tokens are suppressed) with the same sampling. They take turns, in pairs, so that other load on
the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from lm_calib_plugin.calibration.generation import end_ids, write_batch
from lm_calib_plugin.calibration.sampling import Decoding, uniform_numbers


def ours(model: Any, prefixes: torch.Tensor, tokens: int) -> None:
    """Write with this package."""
    allowed = torch.ones(model.config.vocab_size, dtype=torch.bool)
    allowed[sorted(end_ids(model, None))] = False
    rows = write_batch(
        model,
        prefixes.tolist(),
        uniform_numbers(0, 0, len(prefixes), tokens),
        Decoding(),
        allowed,
        frozenset(),
    )
    assert all(len(row.ids) == tokens for row in rows)


def theirs(model: Any, prefixes: torch.Tensor, tokens: int) -> None:
    """Write with ``model.generate``."""
    chosen = Decoding()
    rows = model.generate(
        prefixes.to(model.device),
        attention_mask=torch.ones_like(prefixes).to(model.device),
        do_sample=True,
        temperature=chosen.temperature,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
        repetition_penalty=chosen.repetition_penalty,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=0,
    )
    assert rows.shape[1] == prefixes.shape[1] + tokens


def seconds(side: Any, model: Any, prefixes: torch.Tensor, tokens: int) -> float:
    """Return the wall time of one side."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    side(model, prefixes, tokens)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(model: Any, batch: int, tokens: int, pairs: int) -> dict[str, Any]:
    """Return tokens per second of both sides at one batch size."""
    generator = torch.Generator().manual_seed(batch)
    prefixes = torch.randint(100, model.config.vocab_size, (batch, 2), generator=generator)
    took: dict[str, list[float]] = {"ours": [], "generate": []}
    for number in range(pairs):
        sides = [("ours", ours), ("generate", theirs)]
        for name, side in sides if number % 2 == 0 else reversed(sides):
            took[name].append(seconds(side, model, prefixes, tokens))
    rates = {
        name: round(batch * tokens / statistics.median(values), 1) for name, values in took.items()
    }
    ratios = [theirs / mine for mine, theirs in zip(*took.values(), strict=True)]
    return {
        "batch": batch,
        "tokens": tokens,
        "pairs": pairs,
        "tokens_per_second": rates,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    """Measure every batch size, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=getattr(torch, given.dtype)
    ).eval()
    model.to(given.device)
    measure(model, given.batch[0], 8, 1)  # the first call of either side pays for what is set up
    rows = [measure(model, batch, given.tokens, given.pairs) for batch in given.batch]
    best = {
        name: max(row["tokens_per_second"][name] for row in rows) for name in ("ours", "generate")
    }
    line = {
        "model": Path(given.model).name,
        "dtype": given.dtype,
        "rows": rows,
        "best_ratio": round(best["ours"] / best["generate"], 3),
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "device": torch.cuda.get_device_name() if given.device != "cpu" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    print(json.dumps(line))
    if given.json:
        before = json.loads(given.json.read_text()) if given.json.exists() else []
        given.json.write_text(json.dumps([*before, line], indent=1) + "\n")


if __name__ == "__main__":
    main()
