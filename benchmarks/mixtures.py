"""Worst domain of a searched mix, the uniform mix and every single source, at several levels.

    python benchmarks/mixtures.py MODEL --level method=wanda,sparsity=0.5 --level pattern... \
        --source tiny=file:stories.txt --source code=file:code.txt --out mixtures.json

Sources are domains too: sets come from the fold `choose`, losses from the fold `judge`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration_sets import QUIET, window_losses
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_calib_plugin import Recipe, compress
from lm_calib_plugin.calibration import build_calibration
from lm_calib_plugin.comparison import two_level_bootstrap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--level", action="append", required=True, metavar="KEY=VALUE,...")
    parser.add_argument("--source", action="append", required=True, metavar="NAME=EXPR")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    sources = dict(text.split("=", 1) for text in given.source)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    evals = {}
    for name, expression in sources.items():
        recipe = Recipe(
            method="wanda",
            sparsity=0,
            calibration=expression,
            fold="judge",
            nsamples=given.windows,
            seqlen=given.seqlen,
        )
        evals[name] = build_calibration(
            recipe,
            tokenizer,
            model,
            seqlen=given.seqlen,
            model_id="",
            vocab_size=model.get_input_embeddings().weight.shape[0],
            runtime=QUIET,
        ).sequences
    joined = "+".join(sources.values())
    sets = {**sources, "uniform": joined, "minimax": f"minimax({joined})"}

    def losses() -> dict[str, list[float]]:
        return {name: window_losses(model, list(windows)) for name, windows in evals.items()}

    dense = losses()
    content: dict[str, Any] = {"dense": dense, "levels": []}
    for level in given.level:
        fields = dict(pair.split("=", 1) for pair in level.split(","))
        found: dict[str, list[dict[str, list[float]]]] = {name: [] for name in sets}
        mixes, began = [], time.perf_counter()
        for name, expression in sets.items():
            for seed in range(given.draws):
                model.load_state_dict(state)
                recipe = Recipe(
                    **fields,
                    calibration=expression,
                    fold="all" if name == "minimax" else "choose",
                    nsamples=given.nsamples,
                    seqlen=given.seqlen,
                    calib_seed=seed,
                    heldout=0,
                )
                report = compress(model, tokenizer, recipe, QUIET)
                if name == "minimax":
                    mixes.append(report.calibration["sources"][0]["mixture"])
                found[name].append(losses())
        # [draws, windows] of the rise of the loss, by set and domain.
        rises = {
            name: {d: np.array([x[d] for x in draws]) - np.array(dense[d]) for d in evals}
            for name, draws in found.items()
        }
        worst = {n: max(evals, key=lambda d, n=n: float(rises[n][d].mean())) for n in sets}
        value = {n: float(rises[n][worst[n]].mean()) for n in sets}
        best_single = min(sources, key=value.__getitem__)
        row: dict[str, Any] = {
            "level": level,
            "mean_rise": {
                n: {d: float(x.mean()) for d, x in by.items()} for n, by in rises.items()
            },
            "worst_domain": worst,
            "worst_rise": value,
            "best_single": best_single,
            "shares": [m["shares"] for m in mixes],
            "damp": [m["damp"] for m in mixes],
            "seconds": round(time.perf_counter() - began, 1),
        }
        for other in ("uniform", best_single):
            interval = two_level_bootstrap(
                rises["minimax"][worst["minimax"]], rises[other][worst["minimax"]]
            )
            row[f"minimax minus {other}, {worst['minimax']}"] = vars(interval)
        content["levels"].append(row)
        print(level, {n: (worst[n], round(v, 4)) for n, v in value.items()}, row["shares"])
        given.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
