"""LESS: Selecting Influential Data for Targeted Instruction Tuning (arXiv 2402.04333).

Claim: a small part of the data, chosen by gradients that look like those of the target task, is
as good as all of it.

Reproduced: the idea carried over to calibration (`select=grad_match`): sequences from a pool of
prose and code whose gradients look like those of a few target sequences, beside sequences at
random.

Not reproduced here: instruction tuning itself, the LoRA warm-up and Adam moments; gradients are
those of a fixed random low-rank adapter or the last blocks, projected.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import NOT_STATED, Paper, Study, main, table


def extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pool", type=int, default=24, help="sequences to choose from")
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction removed, wanda")


PAPER = Paper(
    "2402.04333",
    {
        "pretrained": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16", "nsamples": 128,
        "seqlen": 2048, "eval_samples": 128, "text": "c4", "other": "gsm8k", "pool": 2560,
    },
    (
        "The paper tunes on the best 5 % of its pool: a pool of 20 x the sequences.",
        "It does not calibrate compression; models, texts and lengths here are ours ("
        + NOT_STATED + " for this use).",
    ),
    extra=extra,
)  # fmt: skip


def small(study: Study) -> None:
    given = study.given
    mixed = f"{study.text}+{study.other}"
    held = study.judged_on(study.other)
    ways: dict[str, dict[str, Any]] = {
        "target text itself": {"calibration": study.other},
        "mix, at random": {"calibration": mixed},
        "mix, by gradients": {
            "calibration": mixed, "select": "grad_match", "pool": given.pool,
            "select_target": study.other,
        },
        "other text": {"calibration": study.text},
    }  # fmt: skip
    rows: list[list[Any]] = [["dense", study.perplexity(study.model, held)]]
    scores = {}
    for name, fields in ways.items():
        made = study.compressed(method="wanda", sparsity=given.sparsity, **fields)
        scores[name] = study.perplexity(made, held)
        rows.append([name, scores[name]])
    findings = [
        f"On the target, perplexity is {scores['mix, by gradients']:.4g} with sequences chosen by "
        f"gradients, {scores['mix, at random']:.4g} at random from the same mix, "
        f"{scores['target text itself']:.4g} with text of the target alone (one draw)."
    ]
    caption = f"wanda, {given.sparsity:.0%} removed; perplexity on held-out target text."
    head = ["calibrated on", "perplexity"]
    study.show("Gradients choose", findings, [("Selections", table(head, rows, caption))])


if __name__ == "__main__":
    main(__doc__, PAPER, small)
