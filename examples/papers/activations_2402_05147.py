"""ApiQ: Finetuning of 2-Bit Quantized Large Language Model (arXiv 2402.05147).

Claim: what has to be preserved are activations, not weights, layer after layer: errors of early
layers travel on, and quantizing each layer with the inputs that it really gets makes up for them.

Reproduced: the error of the residual stream after each block, for rounding to nearest, for GPTQ
that sees dense inputs, and for GPTQ that sees the inputs which the compressed blocks before it
produce.

Not reproduced here: the LoRA factors that ApiQ initializes, and fine-tuning; this package trains
no adapters.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import NOT_STATED, Paper, Study, main, table
from torch import Tensor

from lm_calib_plugin.guard import evaluation_mode


def extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)


PAPER = Paper(
    "2402.05147",
    {
        "pretrained": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16", "nsamples": 128,
        "seqlen": 2048, "eval_samples": 32, "text": "wikitext2", "bits": 2,
    },
    ("2 bits on Llama-2; calibration set, sample count, group size: " + NOT_STATED,),
    extra=extra,
)  # fmt: skip


def small(study: Study) -> None:
    given = study.given
    width = {"bits": given.bits, "group_size": given.group_size}
    recipes: dict[str, dict[str, Any]] = {
        "rtn": {"method": "rtn", **width},
        "gptq, dense inputs": {
            "method": "gptq", "calibration": study.text, "propagate": "dense", **width
        },
        "gptq, its own inputs": {
            "method": "gptq", "calibration": study.text, "propagate": "compressed", **width
        },
    }  # fmt: skip
    held = study.judged_on(study.text)
    plain = states(study.model, held)
    errors, scores = {}, {}
    for name, fields in recipes.items():
        made = study.compressed(**fields)
        errors[name] = [
            float((new - old).norm() / old.norm())
            for new, old in zip(states(made, held), plain, strict=True)
        ]
        scores[name] = study.perplexity(made, held)
    rows = [[depth, *(errors[n][depth] for n in recipes)] for depth in range(len(plain))]
    findings = [
        f"{name}: error {errors[name][0]:.3g} after the first block, {errors[name][-1]:.3g} after "
        f"the last norm; perplexity {scores[name]:.4g} (dense "
        f"{study.perplexity(study.model, held):.4g})."
        for name in recipes
    ]
    caption = "Relative error of the residual stream, first tokens left out; last: after the norm."
    study.show(
        "Activations by depth", findings,
        [("After each block", table(["block", *recipes], rows, caption))],
    )  # fmt: skip


def states(model: Any, sequences: Any) -> list[Tensor]:
    """Return the residual stream after each block, `[tokens, hidden]`, without first tokens."""
    found: list[list[Tensor]] = []
    with evaluation_mode(model), torch.inference_mode():
        for ids in sequences:
            device = model.get_input_embeddings().weight.device
            output = model(ids[None].to(device), output_hidden_states=True, use_cache=False)
            found.append([state[0, 1:].float().cpu() for state in output.hidden_states[1:]])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


if __name__ == "__main__":
    main(__doc__, PAPER, small)
