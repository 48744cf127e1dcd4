"""A deeper look at depth pruning of LLMs (Siddiqui et al., arXiv 2407.16286).

Claim: about a tenth of the blocks, and a third of the attention layers, can go without loss; how
blocks are ranked matters, and adding back the mean of what a removed block added recovers most.

Reproduced: rankings of blocks by several metrics and their stability over calibration texts (`lm-
calib inspect sensitivity --probe depth`), and perplexity with blocks removed, as they are and
with the mean update.

Not reproduced here: MMLU, Shapley values over sampled subnetworks, trained adapters.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import NOT_STATED, Paper, Study, main, table


def extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--metric", default="depth_cosine", help="depth_cosine, depth_l1, ...")
    parser.add_argument("--blocks", default="1,3", help="how many to remove, joined by commas")
    parser.add_argument("--no-ranking", action="store_true", help="removals alone")


PAPER = Paper(
    "2407.16286",
    {
        "pretrained": "mistralai/Mistral-7B-v0.1", "dtype": "bfloat16", "nsamples": 1024,
        "seqlen": 2048, "eval_samples": 256, "text": "hf:Skylion007/openwebtext::train:text",
        "other": "c4", "blocks": "1,2,3,4,6,8,10",
    },
    (
        "OpenWebText, sequences of 2048 tokens; the published scripts rank with 250,000 of them "
        "(25,000 for Shapley values of parts of blocks): --nsamples 250000 is a long run.",
        "MMLU and perplexity after each removal; numbers for each block: " + NOT_STATED,
    ),
    extra=extra,
)  # fmt: skip


def small(study: Study) -> None:
    given = study.given
    if not given.no_ranking:
        study.command(
            "inspect", "sensitivity", *study.model_words(), *study.text_words(),
            "--probe", "depth", "--metric", "cosine+l2", "--against", study.other,
        )  # fmt: skip
    held = study.judged_on(study.text)
    dense = study.perplexity(study.model, held)
    rows: list[list[Any]] = [[0, dense, dense]]
    for count in map(int, given.blocks.split(",")):
        fields = {"method": given.metric, "blocks": count, "calibration": study.text}
        plain, mended = (
            study.perplexity(study.compressed(**fields, **update), held)
            for update in ({}, {"update": "mean"})
        )
        rows.append([count, plain, mended])
    last = rows[-1]
    findings = [
        f"{last[0]} blocks removed by {given.metric}: perplexity {last[1]:.4g}, with the mean "
        f"update {last[2]:.4g}; dense {dense:.4g}."
    ]
    head = ["blocks removed", "perplexity", "with the mean update"]
    study.show("Depth pruning", findings, [("Removals", table(head, rows))])


if __name__ == "__main__":
    main(__doc__, PAPER, small)
