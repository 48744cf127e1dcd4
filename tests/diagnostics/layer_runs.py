"""Finished runs of tiny models, with the files that a real one leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lm_calib_plugin.compression import compress
from lm_calib_plugin.diagnostics.layers.diagnosis import Diagnosis, diagnose
from lm_calib_plugin.diagnostics.layers.opening import check_models, open_models, text_recipes
from lm_calib_plugin.diagnostics.layers.reading import read_run
from lm_calib_plugin.loading import Loading, load_model
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import Report
from lm_calib_plugin.runtime import Runtime
from tests.tiny import make_tokenizer

QUIET = Runtime(progress=False)


def words(file: Path, documents: int = 200, seed: int = 0) -> str:
    """Write documents of random words; return the expression that reads them."""
    generator = torch.Generator().manual_seed(seed)
    # Sorted: a vocabulary comes in another order every time.
    known = sorted(w for w in make_tokenizer().get_vocab() if w.isalnum() and len(w) > 1)
    picked = torch.randint(len(known), (documents, 40), generator=generator)
    rows = [{"text": " ".join(known[i] for i in row.tolist())} for row in picked]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{file}"


def saved(folder: Path, model: Any) -> str:
    """Save a model with the tiny tokenizer."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def results_file(folder: Path, pretrained: str, **recipe: Any) -> tuple[Path, Report]:
    """Compress a saved model, and write what an evaluation of it writes."""
    model, tokenizer = load_model(Loading(pretrained))
    runtime = Runtime(progress=False, report_dir=str(folder / "reports"))
    report = compress(model, tokenizer, Recipe(**recipe), runtime)
    config = {
        "model": "calib",
        "model_args": {"pretrained": pretrained, "nsamples": 3},
        "model_dtype": str(model.dtype),
        "compression": report.summary(),
    }
    file = folder / "results_2026-01-01T00-00-00.json"
    file.write_text(json.dumps({"results": {}, "config": config}))
    return file, report


def examined(place: Path, text: str | None = None, samples: int = 8, **given: Any) -> Diagnosis:
    """Do what the command does."""
    run = read_run(place)
    name = check_models(run, given.get("pretrained"), None, True)
    assert name is not None
    texts = text_recipes(run, text, samples, 32, 7)
    loading = Loading(name, dtype=run.dtype or "auto")
    opened = open_models(run, loading, texts, given.get("compressed"), "given", QUIET)
    return diagnose(run, opened, progress=False)


def why(found: Diagnosis, name: str) -> dict[str, str]:
    """Return the reasons of one of the worst layers, by rule."""
    return {r.rule: r.words for layer, own in found.worst for r in own if layer.name == name}
