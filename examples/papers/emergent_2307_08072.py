"""Do Emergent Abilities Exist in Quantized Large Language Models: An Empirical Study (arXiv
2307.08072).

Claim: 4-bit models keep their abilities, 2-bit ones lose them; the feed-forward part and outlier
dimensions are most sensitive.

Reproduced: everything compressed but one group, and only one group, by the NLL of held-out text,
with the fraction of the damage that sparing a group recovers (`lm-calib inspect sensitivity
--probe groups`).

Not reproduced here: in-context learning, chain of thought and instruction following as tasks, and
fine-tuning after quantization.
"""

from __future__ import annotations

import argparse

from common import NOT_STATED, Paper, Study, main


def extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--method", default="rtn", help="the paper's is gptq")
    parser.add_argument("--group-size", type=int, default=64)


PAPER = Paper(
    "2307.08072",
    {
        "pretrained": "huggyllama/llama-7b", "dtype": "float16", "nsamples": 128, "seqlen": 2048,
        "eval_samples": 64, "text": "c4", "method": "gptq", "bits": 2, "group_size": 128,
    },
    (
        "LLaMA of several sizes, GPTQ at 2, 4 and 8 bits: run it once for each.",
        "Calibration set and group size: " + NOT_STATED,
    ),
    extra=extra,
    small={"eval_samples": 4, "seqlen": 64},
)  # fmt: skip


def small(study: Study) -> None:
    given = study.given
    fields = {"method": given.method, "bits": given.bits, "group_size": given.group_size}
    if given.method != "rtn":
        fields["calibration"] = study.text
    study.command(
        "inspect", "sensitivity", *study.model_words(), *study.text_words(),
        "--probe", "groups", *study.recipe_words(**fields),
    )  # fmt: skip


if __name__ == "__main__":
    main(__doc__, PAPER, small)
