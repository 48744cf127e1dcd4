"""On the Impact of Calibration Data in Post-training Quantization and Pruning (Williams and
Aletras, arXiv 2311.09755).

Claim: another draw from the same source changes results, for pruning more than for quantization,
and stable perplexity does not mean stable task accuracy.

Reproduced: sets of one source that share no sequence, methods that prune and that quantize,
spread of perplexity over the sets. A method without data is the control: its spread is 0.

Not reproduced here: tasks (leaderboard L2 has them), five sources, nine models, SpQR.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import NOT_STATED, Paper, Study, leaderboard, main, table

from lm_calib_plugin import CalibrationSet
from lm_calib_plugin.comparison import draw_spread

METHODS: dict[str, dict[str, Any]] = {
    "magnitude 50%": {"method": "magnitude", "sparsity": 0.5},
    "wanda 50%": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt 50%": {"method": "sparsegpt", "sparsity": 0.5},
    "gptq W3": {"method": "gptq", "bits": 3, "group_size": -1},
}


def extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draws", type=int, default=3, help="sets, none sharing a sequence")


PAPER = Paper(
    "2311.09755",
    {"nsamples": 128, "seqlen": 2048},
    (
        "Five sources x ten sets of 128 x 2048 tokens that do not overlap; C4 is one of the "
        "sources, all names: " + NOT_STATED,
        "GPTQ and SpQR at 4 bits, SparseGPT, Wanda; LLaMA and Vicuna 7B-33B, OPT 6.7B-30B; eleven "
        "evaluations a model. The grid: one model, GPTQ, AWQ, SparseGPT, Wanda, four sources.",
    ),
    commands=lambda _: leaderboard("l2.yaml"),
    extra=extra,
)


def small(study: Study) -> None:
    given = study.given
    if given.draws < 2:
        raise SystemExit("error: --draws: 2 or more, as draws are what is compared")
    whole = study.drawn(study.text, count=given.draws * given.nsamples)
    sets = [
        CalibrationSet.of(
            whole.sequences[i :: given.draws], seqlen=given.seqlen, seed=i,
            tokenizer=whole.tokenizer, sources=whole.sources,
        )
        for i in range(given.draws)
    ]  # fmt: skip
    held = study.judged_on(study.text)
    rows: list[list[Any]] = [["dense", study.perplexity(study.model, held), None, None, None]]
    spreads = {}
    for name, fields in METHODS.items():
        if fields["method"] == "magnitude":
            values = [study.perplexity(study.compressed(**fields), held)] * given.draws
        else:
            values = [
                study.perplexity(
                    study.compressed(calibration=study.text, calibration_set=one, **fields), held
                )
                for one in sets
            ]
        spread = draw_spread(values)
        spreads[name] = spread.sd / spread.mean
        rows.append([name, spread.mean, spread.sd, min(values), max(values)])
    most = max(spreads, key=lambda name: spreads[name])
    findings = [
        f"Over {given.draws} sets of one source, perplexity varies most for {most}: a standard "
        f"deviation of {spreads[most]:.2%} of its mean.",
        f"The control without data varies by {spreads['magnitude 50%']:.2%}.",
    ]
    head = ["method", "perplexity", "sd", "lowest", "highest"]
    study.show("Draws of one source", findings, [("Over sets", table(head, rows))])


if __name__ == "__main__":
    main(__doc__, PAPER, small)
