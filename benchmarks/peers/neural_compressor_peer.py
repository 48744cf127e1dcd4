"""neural-compressor's GPTQ on calibration tokens made before: one JSON line of seconds.

    PYTHON benchmarks/peers/neural_compressor_peer.py gptq MODEL tokens.json [--blocks N]

For an environment of its own (``neural-compressor[pt]`` 3.10): preparing, running the sequences and
converting, without loading. 3 bits in groups of 64, as ours.
"""

from __future__ import annotations

import json

import torch
from common import arguments, load, timed, windows
from neural_compressor.torch.quantization import GPTQConfig, convert, prepare


def main() -> None:
    """Run the command line."""
    given = arguments(__doc__, ["gptq"])
    model, rows = load(given), windows(given)

    def work() -> None:
        prepared = prepare(model, GPTQConfig(bits=3, group_size=64, use_sym=True))
        for row in rows:
            prepared(torch.tensor([row]))
        convert(prepared)

    print(json.dumps(timed(given, work)))


if __name__ == "__main__":
    main()
