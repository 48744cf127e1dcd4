"""Why Do Some Inputs Break Low-Bit LLM Quantization? (arXiv 2506.12044).

Claim: methods break on the same inputs: the rise of the NLL of examples is strongly correlated
between pairs of 3-4-bit methods, and a small norm of the residual stream foretells it.

Reproduced: the rise of each sequence under several methods, correlations between all pairs
(Pearson and rank), and rank correlation with the norm of the last residual stream of the dense
model.

Not reproduced here: the paper's 50 pairs of methods and models, and its analysis inside layers.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from typing import Any

import numpy as np
from common import Paper, Study, main, table

from lm_calib_plugin.comparison import spearman
from lm_calib_plugin.diagnostics.divergence import residual_norms


def extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--methods", default="rtn,gptq,awq", help="joined by commas")


PAPER = Paper(
    "2506.12044",
    {
        "pretrained": "meta-llama/Meta-Llama-3-8B", "dtype": "bfloat16", "nsamples": 128,
        "seqlen": 2048, "eval_samples": 1000, "text": "fineweb", "other": "code",
        "group_size": 128, "methods": "rtn,gptq,awq,autoround,hqq",
    },
    (
        "3 and 4 bits; the published mean correlation over 50 pairs is 0.82.",
        "Which models, methods and texts make up the pairs: not stated in what we could read.",
    ),
    extra=extra,
    small={"eval_samples": 12, "seqlen": 96},
)  # fmt: skip


def small(study: Study) -> None:
    given = study.given
    held = [*study.judged_on(study.text), *study.judged_on(study.other)]
    with residual_norms(study.model) as noted:
        before = np.array([float(one.mean()) for one in study.nll(study.model, held)])
    norms = [noted[tuple(ids.tolist())] for ids in held]
    rises = {}
    for method in given.methods.split(","):
        fields: dict[str, Any] = {"method": method, "bits": given.bits}
        fields["group_size"] = given.group_size
        if method not in ("rtn", "hqq"):
            fields["calibration"] = study.text
        after = study.nll(study.compressed(**fields), held)
        rises[method] = np.array([float(one.mean()) for one in after]) - before
    rows = []
    for a, b in combinations(rises, 2):
        rank = spearman(rises[a].tolist(), rises[b].tolist())
        rows.append([f"{a}, {b}", float(np.corrcoef(rises[a], rises[b])[0, 1]), rank.value])
    related: list[list[Any]] = []
    for method, rise in rises.items():
        found = spearman(rise.tolist(), norms)
        related.append([method, float(rise.mean()), found.value, found.low, found.high])
    mean = float(np.mean([row[1] for row in rows]))
    hardest = max(range(len(held)), key=lambda i: sum(r[i] for r in rises.values()))
    text = study.tokenizer.decode(held[hardest])[:60]
    findings = [
        f"Rises of the NLL of {len(held)} sequences correlate {mean:.2f} on average over "
        f"{len(rows)} pairs of methods (the paper: 0.82 over 50 pairs).",
        f"Hardest for all: {text!r}, by {np.mean([r[hardest] for r in rises.values()]):.3g} nats.",
    ]
    study.show(
        "Why inputs break", findings,
        [
            ("Pairs of methods", table(["pair", "Pearson", "Spearman"], rows)),
            (
                "Residual norm of the dense model",
                table(["method", "mean rise", "Spearman with norm", "low", "high"], related),
            ),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main(__doc__, PAPER, small)
