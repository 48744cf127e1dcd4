"""Evaluating the Impact of Compression Techniques on Task-Specific Performance of Large Language
Models (Khanal and Capone, arXiv 2409.11233).

Claim: SparseGPT and Wanda keep perplexity up to half of the weights while other abilities fall;
Jensen-Shannon divergence to the dense model shows it; text of the task calibrates better for it.

Reproduced: magnitude, Wanda and SparseGPT at several fractions removed, calibrated on general
text and on text of the "task" (here: code); perplexity, JS and flips of the likeliest token on
held-out task text.

Not reproduced here: judging of answers by another model; the paper's way of averaging over tokens
is not stated in what we could read (here: mean over tokens, full vocabulary, nats).
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from common import NOT_STATED, Paper, Study, main, table

from lm_calib_plugin.diagnostics.scoring import divergence_of
from lm_calib_plugin.diagnostics.tokens import TokenDivergence


def extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fractions", default="0.3,0.5", help="removed, joined by commas")
    parser.add_argument("--methods", default="magnitude,wanda", help="joined by commas")


PAPER = Paper(
    "2409.11233",
    {
        "pretrained": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16", "nsamples": 128,
        "seqlen": 2048, "eval_samples": 5000, "text": "c4",
        "other": "hf:tatsu-lab/alpaca::train:text", "methods": "magnitude,sparsegpt,wanda",
        "fractions": "0.1,0.2,0.3,0.4,0.5,0.6,0.7",
    },
    (
        "LLaMA-2-7B, 128 random samples of C4 against Alpaca, judged on 5,000 random samples.",
        "The fractions removed, sequence length, result tables: " + NOT_STATED,
    ),
    extra=extra,
)  # fmt: skip


def small(study: Study) -> None:
    given = study.given
    held = study.judged_on(study.other)
    rows: list[list[Any]] = []
    js: dict[tuple[str, float, str], float] = {}
    for method in given.methods.split(","):
        sets = (
            {"none": None}
            if method == "magnitude"
            else {"general": study.text, "task": study.other}
        )
        for fraction in map(float, given.fractions.split(",")):
            for name, expression in sets.items():
                fields: dict[str, Any] = {"method": method, "sparsity": fraction}
                if expression is not None:
                    fields["calibration"] = expression
                made = study.compressed(**fields)
                parts = divergence_of(study.model, made, held, progress=not given.quiet)
                one = TokenDivergence.joined(parts)
                js[method, fraction, name] = float(one.js.mean())
                before, after = (float(n.mean()) for n in (one.nll_dense, one.nll_compressed))
                rows.append(
                    [method, fraction, name, math.exp(min(after, 700)), after - before,
                     js[method, fraction, name], float(one.flipped.mean())]
                )  # fmt: skip
    findings = []
    for (method, fraction, name), value in js.items():
        if name == "task":
            other = js[method, fraction, "general"]
            findings.append(
                f"{method}, {fraction:.0%} removed: JS on task text {value:.3g} nats calibrated on "
                f"text of the task, {other:.3g} on general text."
            )
    head = ["method", "removed", "calibrated on", "perplexity", "rise of NLL", "JS", "flips"]
    study.show("Divergence", findings, [("On held-out task text", table(head, rows))])


if __name__ == "__main__":
    main(__doc__, PAPER, small)
