"""Is the spread over draws that a bank predicts the spread that evaluations show?

    python benchmarks/draw_spread.py MODEL method=sparsegpt,sparsity=0.5 --draws 10 --pool 128 \
        --source tiny=file:stories.txt --domain code=file:code.txt --out spread.json

Ten new draws (other seeds, fold `choose`) are compressed and evaluated on the fold `judge` of every
domain; a bank of other sequences of the source predicts the relative spread of the layer error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from calibration_sets import QUIET, window_losses
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_calib_plugin import Recipe, compress
from lm_calib_plugin.bank import Part, build_bank
from lm_calib_plugin.bank.draws import draw_uncertainty
from lm_calib_plugin.bank.mixtures import make_task
from lm_calib_plugin.bank.transfer import transfer
from lm_calib_plugin.calibration import build_calibration


def named(texts: list[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("recipe", help="KEY=VALUE,... without calibration")
    parser.add_argument("--source", action="append", required=True, metavar="NAME=EXPR")
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=EXPR")
    parser.add_argument("--null", action="append", default=[], metavar="NAME=EXPR")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--pool", type=int, default=128, help="sequences of a source in the bank")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    sources = named(given.source)
    domains = sources | named(given.domain)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fields = dict(pair.split("=", 1) for pair in given.recipe.split(","))
    vocab_size = model.get_input_embeddings().weight.shape[0]

    def draw(expression: str, fold: str, count: int, seed: int) -> Any:
        recipe = Recipe(
            method="wanda",
            sparsity=0,
            calibration=expression,
            fold=fold,
            nsamples=count,
            seqlen=given.seqlen,
            calib_seed=seed,
        )
        return build_calibration(
            recipe,
            tokenizer,
            model,
            seqlen=given.seqlen,
            model_id="",
            vocab_size=vocab_size,
            runtime=QUIET,
        )

    # Two disjoint halves of one draw: what the bank judges on is never evaluated.
    judged = {name: draw(e, "judge", 2 * given.windows, 1000) for name, e in domains.items()}
    evals = {name: list(s.sequences[given.windows :]) for name, s in judged.items()}
    dense = {name: statistics.mean(window_losses(model, w)) for name, w in evals.items()}
    sets = {
        f"{name}-{seed}": draw(e, "choose", given.nsamples, seed)
        for name, e in sources.items()
        for seed in range(given.draws)
    }
    sets |= {name: draw(e, "choose", given.nsamples, 0) for name, e in named(given.null).items()}

    began = time.perf_counter()
    recipe = Recipe(**fields, heldout=0)
    second = recipe.make_method().statistic == "gram"
    parts = [Part(n, "set", s, second_order=second) for n, s in sets.items()]
    parts += [Part(n, "judge", draw(e, "judge", given.windows, 1000)) for n, e in domains.items()]
    parts += [
        Part(
            n,
            "choose",
            draw(e, "choose", given.pool if n in sources else given.nsamples, 500),
            second_order=second,
            groups=given.pool if n in sources else 1,
        )
        for n, e in domains.items()
    ]
    task = make_task(recipe, model, tokenizer, seqlen=given.seqlen, runtime=QUIET)
    with tempfile.TemporaryDirectory() as folder:
        bank = build_bank(model, task.layers, task.blocks, parts, f"{folder}/bank", runtime=QUIET)
        seconds = {"bank": time.perf_counter() - began}
        studies = {
            name: draw_uncertainty(
                bank,
                task.layers,
                task.method,
                name,
                nsamples=given.nsamples,
                domains=list(domains),
                rows=None,
            )
            for name in sources
        }
        seconds["draws"] = sum(s.seconds for s in studies.values())
        began = time.perf_counter()
        weights = {name: bank.mixture({name: 1.0}, "set") for name in sets}
        found = transfer(bank, task.layers, task.method, weights, list(domains))
        seconds["transfer"] = time.perf_counter() - began
    began = time.perf_counter()
    losses: dict[str, dict[str, float]] = {}
    for name, calibration in sets.items():
        model.load_state_dict(state)
        compress(model, tokenizer, recipe, QUIET, calibration)
        losses[name] = {d: statistics.mean(window_losses(model, w)) for d, w in evals.items()}
    seconds["evaluation"] = time.perf_counter() - began
    rows = []
    for name, study in studies.items():
        for domain in domains:
            rises = [losses[f"{name}-{s}"][domain] - dense[domain] for s in range(given.draws)]
            measured = statistics.stdev(rises) / statistics.mean(rises)
            predicted = study.relative_spread(domain)
            rows.append(
                {
                    "source": name,
                    "domain": domain,
                    "mean_rise": statistics.mean(rises),
                    "measured_spread": measured,
                    "predicted_spread": predicted,
                    "ratio": predicted / measured,
                    "flip": study.flip,
                    "jaccard": study.jaccard,
                }
            )
            print(rows[-1])
    content = {
        "recipe": given.recipe,
        "arguments": {k: v for k, v in vars(given).items() if isinstance(v, int)},
        "dense": dense,
        "losses": losses,
        "spread": rows,
        "transfer": found.to_json(),
        "seconds": seconds,
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
