"""What Makes Quantization for Large Language Models Hard? An Empirical Study from the Lens of
Perturbation (arXiv 2403.06408).

Claim: how much a model suffers follows how large the perturbation is, more than how it is
distributed.

Reproduced: a ruler of noise of stated relative size (Gaussian, uniform, and with the signs of the
rounding error) on weights, with the actual quantization error on the same axis (`lm-calib inspect
sensitivity --probe noise`).

Not reproduced here: quantization after x^(1/3), W4A16 and W8A8 on the paper's models (which ones:
not stated in what we could read).
"""

from __future__ import annotations

import argparse

from common import NOT_STATED, Paper, Study, main


def extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=int, default=3, help="of the weights; groups as below")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--noise", default="gaussian+aligned", help="kinds of noise, joined by +")


PAPER = Paper(
    "2403.06408",
    {
        "pretrained": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16", "seqlen": 2048,
        "eval_samples": 128, "text": "wikitext2", "bits": 4, "group_size": 128,
        "noise": "gaussian+uniform+aligned",
    },
    ("Models, sizes of noise, number of samples: " + NOT_STATED + "; W4A16 and W8A8 are named.",),
    extra=extra,
    small={"eval_samples": 2, "seqlen": 64},
)  # fmt: skip


def small(study: Study) -> None:
    given = study.given
    study.command(
        "inspect", "sensitivity", *study.model_words(), *study.text_words(),
        "--probe", "noise", "--noise", given.noise, "--noise-seeds", "2",
        *study.recipe_words(method="rtn", bits=given.bits, group_size=given.group_size),
    )  # fmt: skip


if __name__ == "__main__":
    main(__doc__, PAPER, small)
