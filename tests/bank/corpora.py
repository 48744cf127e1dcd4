"""Small text files of several kinds, with documents enough in every fold."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from lm_calib_plugin import Recipe, Runtime, engine
from lm_calib_plugin.bank.mixtures import Task, make_task
from tests.tiny import make_model, make_tokenizer

QUIET = Runtime(progress=False)
KINDS = {
    "prose": ["the", "of", "and", "to", "in", "a", "is", "that", "it", "was", "for", "on", "are"],
    "digits": list("0123456789.,?!:;"),
    "letters": [chr(c) for c in range(ord("a"), ord("z") + 1)],
}
WANDA: dict[str, Any] = {"method": "wanda", "sparsity": 0.5, "heldout": 0}
SHORT: dict[str, Any] = {"nsamples": 6, "seqlen": 12}


def documents(kind: str, count: int = 60, seed: int = 0) -> list[str]:
    """Return texts of 40 words each; no two are equal."""
    generator = random.Random(f"{kind} {seed}")
    return [" ".join(generator.choices(KINDS[kind], k=40)) for _ in range(count)]


def write(folder: Path, kind: str, count: int = 60) -> str:
    """Write a file of one kind; return the calibration expression that names it."""
    file = folder / f"{kind}.jsonl"
    rows = [json.dumps({"text": text}) + "\n" for text in documents(kind, count)]
    file.write_text("".join(rows))
    return f"file:{file}"


def task_of(recipe: Recipe, model: Any = None) -> Task:
    """Return the task of a recipe on the tiny model."""
    return make_task(
        recipe, model or make_model(num_hidden_layers=2), make_tokenizer(), seqlen=12, runtime=QUIET
    )


def inputs(model: Any, sequences: Any) -> list[dict[str, torch.Tensor]]:
    """Run every sequence alone through the plain model; inputs of its linear layers, float64."""
    found: list[dict[str, torch.Tensor]] = []
    layers, _ = engine.select_layers(model, engine.find_blocks(model), None, ())

    def note(name: str) -> Any:
        return lambda _m, args: found[-1].update({name: args[0].double().flatten(0, -2)})

    hooks = [x.module.register_forward_pre_hook(note(x.name)) for x in layers]
    with torch.no_grad():
        for ids in sequences:
            found.append({})
            model(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    return found
