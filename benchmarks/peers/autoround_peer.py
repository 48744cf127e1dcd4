"""auto-round on calibration tokens made before: one JSON line of seconds.

    PYTHON benchmarks/peers/autoround_peer.py 'autoround;bits=3;...' MODEL tokens.json [--blocks N]

For an environment of its own (auto-round 0.16.1). Runs the same number of steps with as many
sequences a step as ours does by ``rounding=autoround?iters=20&batch=8``; seconds without loading
and saving.
"""

from __future__ import annotations

import json

import torch
from auto_round import AutoRound
from common import arguments, load, timed, windows
from transformers import AutoTokenizer

STEPS, BATCH = 20, 8


def main() -> None:
    """Run the command line."""
    given = arguments(__doc__, ["autoround"])
    rows = windows(given)
    data = [
        {"input_ids": torch.tensor([r]), "attention_mask": torch.ones(1, len(r)).long()}
        for r in rows
    ]
    rounding = AutoRound(
        load(given),
        AutoTokenizer.from_pretrained(given.model),
        bits=3,
        group_size=64,
        sym=True,
        iters=STEPS,
        nsamples=len(rows),
        seqlen=len(rows[0]),
        batch_size=BATCH,
        dataset=data,
        device_map="cpu",
        enable_torch_compile=False,
        # In float32, as ours: by default it computes in bfloat16, which is faster on some CPUs.
        amp=False,
    )
    print(json.dumps(timed(given, rounding.quantize)))


if __name__ == "__main__":
    main()
