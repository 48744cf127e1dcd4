"""Compress models of several depths from a disk and print how much memory each took; a program."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress
from tests.tiny import VOCAB, random_ids

HIDDEN = 256
QUIET = Runtime(progress=False, calib_batch_size=4)


def write_model(folder: Path, depth: int) -> None:
    """Write a model with one block a file; no more than one is ever in memory."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    state, files = LlamaForCausalLM(config).state_dict(), {}
    for index in range(-1, depth):
        own = {n: t for n, t in state.items() if (".layers." in n) == (index >= 0)}
        own = {n.replace("layers.0.", f"layers.{index}."): t for n, t in own.items()}
        save_file(own, folder / f"{index + 1}.safetensors", metadata={"format": "pt"})
        files |= dict.fromkeys(own, f"{index + 1}.safetensors")
    content = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    config.num_hidden_layers = depth
    config.save_pretrained(folder)


def peak_bytes() -> int:
    """Return the most memory this process had since the count began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _now() -> int:
    """Count from now on, and return what the process has."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def growth(folder: Path, depth: int, method: str) -> int:
    """Return how many bytes a model and its compression took at most."""
    write_model(folder / f"{depth}", depth)
    gc.collect()
    before = _now()
    model = AutoModelForCausalLM.from_pretrained(
        folder / f"{depth}", device_map={"": "disk"}, offload_folder=str(folder / "offload")
    )
    _now()  # what loading took for a moment is not counted
    data = CalibrationSet.of(random_ids([32] * 8), seqlen=32)
    compress(model, None, Recipe(method=method, sparsity=0.5), QUIET, data)
    return peak_bytes() - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, name = Path(sys.argv[1]), sys.argv[2]
    growth(place, 2, name)  # whatever is loaded or set up once
    print(json.dumps([growth(place, int(depth), name) for depth in sys.argv[3:]]))
