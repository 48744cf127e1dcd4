"""Tokens a second of one model dense, simulated and packed, by turns in one run.

    python benchmarks/packed_evaluation.py MODEL OUT.json --recipe method=rtn,scheme=W8A8
        [--tokens tokens.json] [--windows 8] [--batch 1] [--dtype float32] [--device cpu]

``--tokens`` (a file of ``tokens.py``) gives calibration and evaluation windows; without it random
ids serve. The ratio of times is what counts: the three models see the same windows one after the
other. Logits of packed and simulated differ where a last digit moved an input to the next level.
Beside it stand the difference of simulated from dense logits, and that of the simulated model from
itself, and the dense one from itself, when embeddings change by a relative 1e-7.
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
from transformers import AutoModelForCausalLM

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress


def seconds(model: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the time of one forward pass, and its logits."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, logits


def perturbed(model: Any, ids: torch.Tensor, size: float = 1e-7) -> torch.Tensor:
    """Return the logits when embeddings are changed by random relative amounts of this size."""
    generator = torch.Generator().manual_seed(1)

    def change(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return output * (1 + size * noise)

    hook = model.get_input_embeddings().register_forward_hook(change)
    try:
        return seconds(model, ids)[1]
    finally:
        hook.remove()


def distance(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the relative difference in the Frobenius norm."""
    return float((found - reference).float().norm() / reference.float().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", required=True, help="KEY=VALUE,... without execution")
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    fields: dict[str, Any] = dict(pair.split("=", 1) for pair in given.recipe.split(","))
    runtime = Runtime(progress=False, eval_tokens=given.batch * given.seqlen)
    read = json.loads(given.tokens.read_text()) if given.tokens else {}
    calibration = CalibrationSet.of(read["calib"], seqlen=given.seqlen) if read else None
    models, report = {}, None
    for name in ("dense", "simulated", "packed"):
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype))
        models[name] = model.to(given.device).eval()
        if name != "dense":
            recipe = Recipe(**fields, execution=name)
            data = calibration if recipe.needs_data else None
            report = compress(models[name], None, recipe, runtime, data)
    generator = torch.Generator().manual_seed(0)
    vocabulary = models["dense"].get_input_embeddings().weight.shape[0]
    shape = (given.windows + 1, given.batch, given.seqlen)
    windows = torch.randint(vocabulary, shape, generator=generator)
    if read:
        texts = torch.tensor([w[: given.seqlen] for text in read["evals"].values() for w in text])
        windows = texts[: given.batch * len(windows)].reshape(-1, given.batch, given.seqlen)
    windows = windows.to(given.device)
    times: dict[str, list[float]] = {name: [] for name in models}
    gaps: dict[str, list[float]] = {
        name: [] for name in ("packed", "dense", "simulated_perturbed", "dense_perturbed")
    }
    for turn, ids in enumerate(windows):
        logits = {}
        for name, model in models.items():
            spent, logits[name] = seconds(model, ids)
            if turn:
                times[name].append(spent)
        for name in ("packed", "dense"):
            gaps[name].append(distance(logits[name], logits["simulated"]))
        for name in ("simulated", "dense"):
            changed = perturbed(models[name], ids)
            gaps[f"{name}_perturbed"].append(distance(changed, logits[name]))
    assert report is not None
    tokens = given.batch * given.seqlen
    found = {
        "recipe": given.recipe,
        "batch": given.batch,
        "seqlen": given.seqlen,
        "tokens_per_second": {k: round(tokens / statistics.median(v), 1) for k, v in times.items()},
        "packed_over_dense": round(
            statistics.median(d / p for d, p in zip(times["dense"], times["packed"], strict=True)),
            3,
        ),
        "packed_over_simulated": round(
            statistics.median(
                s / p for s, p in zip(times["simulated"], times["packed"], strict=True)
            ),
            3,
        ),
        "logits_differ": {k: float(f"{statistics.median(v):.3g}") for k, v in gaps.items()},
        "execution": report.execution,
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            "machine": platform.processor() or platform.machine(),
            "device": given.device,
            "dtype": given.dtype,
            "torch": torch.__version__,
        },
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
