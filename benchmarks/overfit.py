"""Does a re-fit over-fit, and does text that the model wrote itself change that?

    python benchmarks/overfit.py MODEL TEXT OUT.json [--nsamples 4 8 32]

Calibration windows come from documents of the fold ``choose`` of TEXT, or from the model itself
(``self:bos``); perplexity is measured on windows of the fold ``judge``. For every size and source:
Wanda's mask alone, with SparseGPT's update and with the re-fit, and the layer error on sequences
that were used and on sequences held out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from perplexity import perplexity
from pruning_levels import documents, mean
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_calib_plugin import Recipe, Runtime, compress
from lm_calib_plugin.calibration import build_calibration

UPDATES = ("none", "obs", "pcg?steps=40&heldout=false", "pcg?steps=40")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="<|endoftext|>")
    parser.add_argument("--nsamples", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.6)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    runtime = Runtime(progress=False, report_dir=tempfile.mkdtemp())

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)

    def drawn(expression: str, fold: str, count: int, seed: int) -> Any:
        recipe = Recipe(
            method="wanda",
            sparsity=given.sparsity,
            calibration=expression,
            fold=fold,
            nsamples=count,
            seqlen=given.seqlen,
            calib_seed=seed,
        )
        return build_calibration(
            recipe,
            tokenizer,
            load(),
            seqlen=given.seqlen,
            model_id=str(given.model),
            vocab_size=len(tokenizer),
            runtime=runtime,
        )

    text = f"file:{documents(given)}"
    judged = [ids.tolist() for ids in drawn(text, "judge", 32, 0).sequences]
    rows = []
    for count in given.nsamples:
        for source in (text, "self:bos"):
            for draw in range(given.draws):
                calibration = drawn(source, "choose", count, draw)
                for update in UPDATES:
                    model = load()
                    recipe = Recipe(
                        method="wanda", sparsity=given.sparsity, update=update, heldout=0.25
                    )
                    report = compress(model, None, recipe, runtime, calibration)
                    errors = [
                        mean([getattr(layer, f"error_{kind}") for layer in report.layers])
                        for kind in ("calibration", "heldout")
                    ]
                    rows.append(
                        {
                            "nsamples": count,
                            "source": source.partition(":")[0],
                            "draw": draw,
                            "update": update,
                            "perplexity": perplexity(model, judged),
                            "error_calibration": errors[0],
                            "error_heldout": errors[1],
                        }
                    )
                    print(rows[-1], flush=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
