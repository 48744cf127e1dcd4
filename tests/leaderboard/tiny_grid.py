"""A grid of real cells that take a moment: tiny models, local tasks, in a folder of a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import saved_model

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
    "this",
    "from",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _task(folder: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **more,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def write_tasks(folder: Path) -> Path:
    """Write a choice, a text and a group of two choices of unequal size; return their folder."""
    folder.mkdir()
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    for name, count, first in (("t_choice", 12, 0), ("t_one", 6, 5), ("t_two", 9, 11)):
        rows = [
            {
                "q": f"{WORDS[(n + first) % 21]} {LETTERS[(3 * n + first) % 26]} is",
                "choices": [LETTERS[n % 26], f"{LETTERS[(n + 7) % 26]} {WORDS[n % 21]}"],
                "gold": n % 2,
            }
            for n in range(count)
        ]
        _task(folder, name, rows, **choice)
    texts = [" ".join(WORDS[n : n + 4 + n]) for n in range(5)]
    _task(
        folder,
        "t_text",
        [{"text": text} for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
    )
    group = {
        "group": "t_group",
        "task": ["t_one", "t_two"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 1.0},
    }
    (folder / "t_group.yaml").write_text(yaml.safe_dump(group))
    return folder


def tiny_grid(place: Path) -> dict[str, Any]:
    """Return the content of a grid of 13 cells; model and tasks are written below ``place``."""
    model = saved_model(place / "model", num_hidden_layers=1)
    return {
        "name": "tiny",
        "models": {"tiny": {"pretrained": model, "dtype": "float32"}},
        "methods": ["wanda", "sparsegpt"],
        "levels": ["50%"],
        "calibrations": {"ids": "random", "letters": "null:ascii"},
        "recipe": {"nsamples": 8, "seqlen": 16},
        "draws": 2,
        "tasks": ["t_choice", "t_text", "t_group"],
        "harness": {
            "include_path": str(write_tasks(place / "tasks")), "device": "cpu", "batch_size": 4,
        },
    }  # fmt: skip


def write_grid(path: Path, content: dict[str, Any]) -> Path:
    """Write a grid file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
