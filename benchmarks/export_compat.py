"""Which versions of other libraries load exported folders, and what they compute.

    python benchmarks/export_compat.py make MODEL FOLDER [--group-size 4]
    OTHER/bin/python benchmarks/export_compat.py load FOLDER OUT.jsonl

``make`` compresses a model in several ways, in float32 and bfloat16, and exports it, with the
logits that it has here beside each folder. ``load`` needs torch and transformers alone: run it in
any environment; one row a folder is added to OUT. "equal" is every logit, bit by bit.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES: dict[str, dict[str, Any]] = {
    "wanda 50%": {"method": "wanda", "sparsity": 0.5},
    "shortgpt, 2 blocks": {"method": "shortgpt", "blocks": 2},
    "flap 20%": {"method": "flap", "sparsity": 0.2},
    "W4A16 gptq": {"method": "gptq", "bits": 4, "group_size": 0},
    "W3A16 gptq": {"method": "gptq", "bits": 3, "group_size": 0},
    "rotation W4A16": {"method": "rotation", "bits": 4, "group_size": 0},
    "W8A8": {"method": "rtn", "scheme": "W8A8"},
    "W8A8_static": {"method": "rtn", "scheme": "W8A8_static"},
    "FP8": {"method": "rtn", "scheme": "FP8"},
}
DATA = {"calibration": "random", "nsamples": 20, "seqlen": 64}
LOGITS = "logits.pt"


def probe(rows: int) -> torch.Tensor:
    return torch.randint(rows, (2, 48), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    ids = probe(model.get_input_embeddings().weight.shape[0])
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def make(pretrained: str, folder: Path, group_size: int) -> None:
    import lm_calib_plugin as lm_calib
    from lm_calib_plugin.export.folder import export_model

    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    for dtype in ("float32", "bfloat16"):
        for name, options in RECIPES.items():
            place = folder / f"{name.replace(' ', '_').replace(',', '')}-{dtype}"
            given = {k: group_size if k == "group_size" else v for k, v in options.items()}
            recipe = lm_calib.Recipe(**DATA, **given)
            model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype)
            report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
            done = export_model(model, tokenizer, recipe, report, place / "model")
            torch.save(logits(model), place / LOGITS)
            print(json.dumps({"name": name, "dtype": dtype, "check": done.check}), flush=True)


def load(folder: Path, out: Path) -> None:
    for place in sorted(p.parent for p in folder.glob(f"*/{LOGITS}")):
        name, _, dtype = place.name.rpartition("-")
        row: dict[str, Any] = {"name": name, "dtype": dtype}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                place / "model", torch_dtype=getattr(torch, dtype)
            )
            AutoTokenizer.from_pretrained(place / "model")
            here, there = logits(model), torch.load(place / LOGITS, weights_only=True)
            row["equal"] = bool(torch.equal(here, there))
            row["difference"] = float((here - there).norm() / there.norm())
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        row["versions"] = {p: _version(p) for p in ("transformers", "compressed-tensors", "torch")}
        with out.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "load"])
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("--group-size", type=int, default=32)
    asked = parser.parse_args()
    if asked.what == "make":
        make(asked.source, asked.target, asked.group_size)
    else:
        load(Path(asked.source), asked.target)


if __name__ == "__main__":
    main()
