"""llm-compressor on calibration tokens made before: one JSON line of seconds.

    PYTHON benchmarks/peers/llm_compressor_peer.py wanda|sparsegpt|gptq MODEL tokens.json \
        [--blocks N] [--perplexity]

For an environment of its own (llmcompressor 0.14.0.1 wants transformers 5.17). Seconds are those of
``oneshot`` alone, without loading. The head is left out by a pattern: its plain name does not match
in the pruning modifiers, and a tied embedding would be pruned with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import arguments, load, timed
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from perplexity import perplexities

HEAD = ["re:.*lm_head"]


def recipe(method: str) -> Any:
    """Return what it is asked to do: half of the weights, or 3 bits in groups of 64."""
    if method == "wanda":
        return WandaPruningModifier(sparsity=0.5, targets=["Linear"], ignore=HEAD)
    if method == "sparsegpt":
        return SparseGPTModifier(sparsity=0.5, targets=["Linear"], ignore=HEAD)
    weights = {
        "num_bits": 3,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 64,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return GPTQModifier(config_groups=groups, ignore=["lm_head"])


def main() -> None:
    """Run the command line."""
    given = arguments(__doc__, ["wanda", "sparsegpt", "gptq"])
    model = load(given)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokens = json.loads(given.tokens.read_text())
    rows = tokens["calib"]
    data = Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )
    if not torch.cuda.is_available():
        # Its cache of activations pins memory, which needs an accelerator.
        IntermediatesCache._pin_intermediate = classmethod(lambda cls, value: None)

    def work() -> None:
        oneshot(
            model=model,
            recipe=recipe(given.method),
            processor=tokenizer,
            dataset=data,
            num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]),
        )

    row = timed(given, work)
    if given.perplexity:
        with torch.inference_mode():
            row["perplexity"] = perplexities(model, tokens["evals"])
    print(json.dumps(row))


if __name__ == "__main__":
    main()
