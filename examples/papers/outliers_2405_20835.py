"""Outliers and Calibration Sets have Diminishing Effect on Quantization of Modern LLMs (Paglieri
et al., arXiv 2405.20835).

Claim: OPT-6.7B, full of outliers, breaks and depends on what it is calibrated with; newer models
are robust to both.

Reproduced: the contrast, with a stand-in for the fragile model: the same model with outlier
channels put in on purpose (it computes the same; a synthetic model, no finding about a real one).
Inputs of 8 bits with one calibrated range a tensor, with a range a token, and with SmoothQuant,
calibrated on prose, code, random tokens and one repeated token.

Layers behind the activation function of the MLP (down_proj) are left as they are: in Llama-like
models a few tokens are huge there by nature, which breaks one range without any help
(--ignore "" shows it).

Not reproduced here: the paper's models, GPTQ and AWQ at 4 bits (leaderboard L3 has them; bit-
widths, sample counts and result tables are not stated in what we could read).
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

from common import NOT_STATED, Paper, Study, leaderboard, main, table

from lm_calib_plugin.diagnostics.outliers import inject_outliers


def extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--factor", type=float, default=32.0, help="of the outliers")
    parser.add_argument("--ignore", default="down_proj", help="layers left as they are, by +")
    parser.add_argument("--observer", default="minmax?first=false", help="what sets static ranges")


PAPER = Paper(
    "2405.20835",
    {"nsamples": 128, "seqlen": 2048},
    (
        "Models: OPT-6.7B, Llama-2-7B, Llama-3-8B, Mistral-7B, Command-R-35B and a sixth; the grid "
        "names three of them.",
        "Sets: RedPajama, random ASCII, ARC and PIQA, single languages of FLORES+ (here: of "
        "Wikipedia).",
        "Bit-widths, number of samples, thresholds for outliers, result tables: " + NOT_STATED,
    ),
    commands=lambda _: leaderboard("l3.yaml"),
    extra=extra,
    small={"eval_samples": 4, "seqlen": 64},
)


def small(study: Study) -> None:
    given = study.given
    fragile = copy.deepcopy(study.model)
    record = inject_outliers(
        fragile, given.factor, choose="bursty", text=study.drawn(study.text).sequences
    )
    sets = {
        "prose": study.text,
        "code": study.other,
        "random": "random",
        "one token": "null:ellipsis",
    }
    held = study.judged_on(study.text)
    found: dict[str, dict[str, float]] = {}
    for name, model in (("original", study.model), ("fragile", fragile)):

        def cost(model: Any = model, **recipe: Any) -> float:
            made = study.compressed(model=model, **recipe) if recipe else model
            return study.perplexity(made, held)

        left = {"ignore": given.ignore} if given.ignore else {}
        row = {"dense": cost(), "a range a token": cost(method="rtn", scheme="W8A8", **left)}
        for text, expression in sets.items():
            static: dict[str, Any] = left | {
                "scheme": "W8A8_static", "calibration": expression, "observer": given.observer
            }  # fmt: skip
            row[f"one range, {text}"] = cost(method="rtn", **static)
            if text in ("prose", "random"):
                row[f"smoothquant, one range, {text}"] = cost(method="smoothquant", **static)
        found[name] = row
    rows = [[n, found["original"][n], found["fragile"][n]] for n in found["original"]]
    study.show(
        "Outliers and calibration sets",
        list(_findings(found, sets, record.difference)),
        [
            (
                "Perplexity on held-out prose",
                table(["inputs of 8 bits", "original", "fragile"], rows),
            )
        ],
    )


def _findings(found: dict[str, dict[str, float]], sets: dict[str, str], moved: float) -> Any:
    original, fragile = found["original"], found["fragile"]
    yield f"The fragile model computes what the original does: logits differ by {moved:.2g}."
    for way in ("one range, prose", "a range a token", "smoothquant, one range, prose"):
        yield (
            f"{way}: perplexity x {original[way] / original['dense']:.3g} for the original, "
            f"x {fragile[way] / fragile['dense']:.3g} for the fragile one."
        )
    for name, row in found.items():
        values = [row[f"one range, {text}"] for text in sets if text != "one token"]
        spread = math.log(max(values) / min(values))
        yield f"{name}: prose, code or random tokens to calibrate on differ by {spread:.3g} nats."


if __name__ == "__main__":
    main(__doc__, PAPER, small)
