"""Self-calibration for Language Model Quantization and Pruning (Williams, Chrysostomou, Aletras,
arXiv 2410.17170).

Claim: text that the model writes from its start token alone, without any outside data, calibrates
about as well as real text, and often better.

Reproduced: `self:bos` (temperature falling over the first tokens, whole vocabulary) beside real
text, other text, random tokens and shuffled text, for pruning.

Not reproduced here: the paper's schedule of temperatures and its result tables, which are not
stated in what we could read; ours fall from 2 to 1 over 20 tokens. Try others: --self
"self:bos?t0=1.5".
"""

from __future__ import annotations

import argparse
from typing import Any

from common import NOT_STATED, Paper, Study, main, table


def extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--self", dest="own", default="self:bos", help="how it writes")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction removed")


PAPER = Paper(
    "2410.17170",
    {
        "pretrained": "google/gemma-2b", "dtype": "bfloat16", "nsamples": 128, "seqlen": 2048,
        "eval_samples": 128, "text": "c4", "other": "wikipedia",
    },
    (
        "Models: Gemma 2B, Phi-2, Mistral 7B, Llama 3.1 8B and others; this runs one at a time.",
        "Start and end of the temperature, length of the ramp, result tables: " + NOT_STATED,
        "128 x 2048 tokens are those of the authors' earlier paper (2311.09755).",
    ),
    extra=extra,
)  # fmt: skip


def small(study: Study) -> None:
    given = study.given
    sets = {
        "real text": study.text,
        "own text": given.own,
        "another kind": study.other,
        "shuffled text": f"null:shuffle({study.text})",
        "random tokens": "random",
    }
    held = study.judged_on(study.text)
    rows: list[list[Any]] = [["none (dense)", study.perplexity(study.model, held)]]
    scores = {}
    for name, expression in sets.items():
        made = study.compressed(
            calibration=expression, method=given.method, sparsity=given.sparsity
        )
        scores[name] = study.perplexity(made, held)
        rows.append([name, scores[name]])
    findings = [
        f"Calibrated on its own text, perplexity is {scores['own text']:.4g}; on real text "
        f"{scores['real text']:.4g}, on random tokens {scores['random tokens']:.4g} (one draw).",
    ]
    caption = f"{given.method}, {given.sparsity:.0%} removed; perplexity on held-out text."
    study.show(
        "Self-calibration",
        findings,
        [("Sources", table(["calibration", "perplexity"], rows, caption))],
    )


if __name__ == "__main__":
    main(__doc__, PAPER, small)
