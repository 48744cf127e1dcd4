"""Perplexity by domain of one model pruned or quantized with many calibration sets.

    python benchmarks/calibration_sets.py MODEL method=wanda,sparsity=0.5 --results out.jsonl \
        --domain code=file:code.txt --set web-0=set:sets/web-0 --set web-1=set:sets/web-1

Evaluation windows come from documents of the fold `judge` of every domain; the first `--judged`
windows of that draw are left to `lm-calib preflight`, which takes exactly those. A set that has its
line in the results already is not evaluated again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_calib_plugin import Recipe, Runtime, compress
from lm_calib_plugin.calibration import build_calibration

QUIET = Runtime(progress=False)


@torch.no_grad()
def window_losses(model: Any, windows: list[torch.Tensor]) -> list[float]:
    """Return the mean negative log-likelihood (nats a token) of every window."""
    losses = []
    for ids in windows:
        log_probs = model(ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        losses.append(float(-log_probs.gather(-1, ids[1:, None]).double().mean()))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("recipe", help="KEY=VALUE,... without calibration; `dense` for none")
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=EXPR")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=EXPR")
    parser.add_argument("--windows", type=int, default=8, help="evaluated, of each domain")
    parser.add_argument("--judged", type=int, default=16, help="left to the preflight")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--results", type=Path, required=True)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    dense = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    evals = {}
    for text in given.domain:
        name, _, expression = text.partition("=")
        drawn = build_calibration(
            Recipe(
                method="wanda",
                sparsity=0,
                calibration=expression,
                fold="judge",
                nsamples=given.judged + given.windows,
                seqlen=given.seqlen,
            ),
            tokenizer,
            seqlen=given.seqlen,
            model_id="",
            vocab_size=dense.get_input_embeddings().weight.shape[0],
            runtime=QUIET,
        )
        evals[name] = list(drawn.sequences[given.judged :])
    state = {k: v.clone() for k, v in dense.state_dict().items()}
    fields = {}
    if given.recipe != "dense":
        fields = dict(pair.split("=", 1) for pair in given.recipe.split(","))
    for text in given.set or ["dense="]:
        name, _, expression = text.partition("=")
        done = []
        if given.results.exists():
            done = [json.loads(line) for line in given.results.read_text().splitlines()]
        if any((d["set"], d["recipe"]) == (name, given.recipe) for d in done):
            continue
        dense.load_state_dict(state)
        line: dict[str, Any] = {"set": name, "recipe": given.recipe}
        began = time.perf_counter()
        if fields:
            recipe = Recipe(**fields, calibration=expression, heldout=0)
            report = compress(dense, tokenizer, recipe, QUIET)
            line |= {
                "key": report.key,
                "calib_id": report.calibration["calib_id"],
                "sparsity": report.achieved["sparsity"],
                "mixture": report.calibration["sources"][0].get("mixture"),
                "seconds": round(time.perf_counter() - began, 1),
            }
        began = time.perf_counter()
        line["losses"] = {d: window_losses(dense, windows) for d, windows in evals.items()}
        line["evaluation_seconds"] = round(time.perf_counter() - began, 1)
        line["threads"], line["cpus"] = torch.get_num_threads(), os.cpu_count()
        with given.results.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(name, given.recipe, {d: round(sum(x) / len(x), 3) for d, x in line["losses"].items()})


if __name__ == "__main__":
    main()
