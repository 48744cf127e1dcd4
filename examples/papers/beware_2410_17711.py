"""Beware of Calibration Data for Pruning Large Language Models (Ji et al., arXiv 2410.17711).

Claim: which source the calibration text comes from matters more than how much of it there is, and
more than the step from one pruning method to another; text that the model writes itself is good.

Reproduced: sources x methods x draws at one fraction removed; perplexity on held-out text, the
split of its variance into source, method and draw, and self-generated text as a source.

Not reproduced here: tasks (the paper's settings run leaderboard L1, which has them), the filter
and prefix ablations, whose numbers are not stated in what we could read.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from common import NOT_STATED, Paper, Study, leaderboard, main, table

from lm_calib_plugin.comparison import draw_spread, variance_shares_of_draws


def extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", default="wanda,magnitude", help="joined by commas")
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction removed")
    parser.add_argument("--draws", type=int, default=2)


PAPER = Paper(
    "2410.17711",
    {"nsamples": 128, "seqlen": 2048},
    (
        "128 x 2048 tokens, 20 draws (seeds 0, 5, ..., 95), as the published scripts have it.",
        "Sources: C4, Wikipedia, SlimPajama, DCLM and self-generated text (5,000 prefixes of "
        "Wikipedia, 2 tokens each, T 0.6, top-p 0.95, top-k 50, penalty 1.2, the fifth of highest "
        "perplexity dropped: calibration=self?mode=paper).",
        "Models: DCLM-7B, LLaMA-3-8B; the grid names the second.",
        "The sparsity of the published 20-seed values: probably 60 %; " + NOT_STATED + ".",
    ),
    commands=lambda _: leaderboard("l1.yaml"),
    extra=extra,
)


def small(study: Study) -> None:
    given = study.given
    if given.draws < 2:
        raise SystemExit("error: --draws: 2 or more, as draws are what is compared")
    sources = {"prose": study.text, "code": study.other, "self": "self:bos", "random": "random"}
    held = study.judged_on(study.text)
    dense = study.perplexity(study.model, held)
    scores: dict[tuple[str, str], list[float]] = {}
    data_free: dict[str, float] = {}
    for method in given.methods.split(","):
        fields: dict[str, Any] = {"method": method, "sparsity": given.sparsity}
        if method == "magnitude":
            data_free[method] = study.perplexity(study.compressed(**fields), held)
            continue
        for name, expression in sources.items():
            scores[name, method] = [
                study.perplexity(study.compressed(seed, calibration=expression, **fields), held)
                for seed in range(given.draws)
            ]
    methods = sorted({method for _, method in scores})
    shares = variance_shares_of_draws(
        [[np.log(scores[name, m]).tolist() for m in methods] for name in sources]
    )
    rows: list[list[Any]] = [["none", "dense", dense, None]]
    rows += [["none", method, value, 0.0] for method, value in data_free.items()]
    for (name, method), values in scores.items():
        spread = draw_spread(values)
        rows.append([name, method, spread.mean, spread.sd])
    best = min(scores, key=lambda key: np.mean(scores[key]))
    worst = max(scores, key=lambda key: np.mean(scores[key]))
    findings = [
        f"Of the variance of log perplexity, {shares.source:.0%} is the source, "
        + (f"{shares.method:.0%} the method, " if len(methods) > 1 else "")
        + f"{shares.draw:.0%} the draw (naive shares; {given.draws} draws).",
        f"Best: {best[1]} on {best[0]} ({np.mean(scores[best]):.4g}); worst: {worst[1]} on "
        f"{worst[0]} ({np.mean(scores[worst]):.4g}); dense {dense:.4g}.",
    ]
    caption = f"Perplexity on held-out prose, {given.sparsity:.0%} removed."
    head = ["source", "method", "perplexity", "sd of draws"]
    study.show("Beware of calibration data", findings, [("Cells", table(head, rows, caption))])


if __name__ == "__main__":
    main(__doc__, PAPER, small)
