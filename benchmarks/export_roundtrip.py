"""Scores of a model compressed on load, and of its exported folder in an environment without us.

    python benchmarks/export_roundtrip.py MODEL OUT.jsonl --tasks T1,T2 [--include-path DIR]
        [--limit 40] [--plain /path/to/other/venv/bin/python] [--only wanda,gptq] [--dtype float32]
        [--calibration c4,nsamples=16,seqlen=256]

For every recipe: ``lm_eval --model calib_* ... export_dir=DIR``, then ``lm_eval --model hf`` on the
folder with the other Python (which must not have this package; default: this one). Compared are
all results, and the answers of every sample. One row a recipe is added to OUT; a recipe that has a
row with the same arguments is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = {
    "magnitude 2:4": ("calib_pruned", "method=magnitude,pattern=2:4"),
    "wanda 50%": ("calib_pruned", "method=wanda,sparsity=0.5"),
    "sparsegpt 50%": ("calib_pruned", "method=sparsegpt,sparsity=0.5"),
    "swap_pcg 60%": ("calib_pruned", "method=swap_pcg,sparsity=0.6"),
    "shortgpt 3 blocks": ("calib_pruned", "method=shortgpt,blocks=3"),
    "flap 20%": ("calib_pruned", "method=flap,sparsity=0.2"),
    "wanda 50%, head untied": (
        "calib_pruned",
        "method=wanda,sparsity=0.5,targets=lm_head+mlp.*,untie=true",
    ),
    "rtn W4": ("calib_quantized", "method=rtn,bits=4,group_size=32"),
    "gptq W3": ("calib_quantized", "method=gptq,bits=3,group_size=32"),
    "gptq W3 asymmetric, dense": (
        "calib_quantized",
        "method=gptq,bits=3,group_size=32,symmetric=false,export_format=dense",
    ),
    "awq W4": ("calib_quantized", "method=awq,bits=4,group_size=32"),
    "rotation+gptq W4": ("calib_quantized", "method=rotation,bits=4,group_size=32"),
    "gptq bits=auto:4": ("calib_quantized", "method=gptq,bits=auto:4,group_size=32"),
    "W8A8 dynamic": ("calib_quantized", "method=rtn,scheme=W8A8"),
    "W8A8 static": ("calib_quantized", "method=rtn,scheme=W8A8_static"),
    "smoothquant W8A8": ("calib_quantized", "method=smoothquant,scheme=W8A8"),
    "FP8 dynamic": ("calib_quantized", "method=rtn,scheme=FP8"),
    "sparsegpt+gptq 50% W4": ("calib", "method=sparsegpt+gptq,sparsity=0.5,bits=4,group_size=32"),
}


def run(python: str, words: list[str], out: Path) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Run lm_eval; return its results file, its samples by task, and seconds."""
    start = time.perf_counter()
    code = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    command = [python, "-c", code, *words, "--output_path", str(out), "--log_samples"]
    env = dict(os.environ)
    if python != sys.executable:
        env.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    (file,) = out.rglob("results_*.json")
    samples = {}
    for path in out.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        samples[path.name.rsplit("_", 1)[0]] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(file.read_text()), samples, time.perf_counter() - start


def scores(results: dict[str, Any]) -> dict[str, Any]:
    return {
        task: {k: v for k, v in values.items() if not k.startswith("name")}
        for task, values in results["results"].items()
    }


def answers(samples: dict[str, Any]) -> dict[str, list[Any]]:
    return {task: [row["filtered_resps"] for row in rows] for task, rows in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--include-path")
    parser.add_argument("--limit")
    parser.add_argument("--plain", default=sys.executable)
    parser.add_argument("--only")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--calibration", default="random,nsamples=20,seqlen=128")
    asked = parser.parse_args()
    common = ["--tasks", asked.tasks, "--device", "cpu"]
    common += ["--include_path", asked.include_path] if asked.include_path else []
    common += ["--limit", asked.limit] if asked.limit else []
    rows = (
        [json.loads(line) for line in asked.out.read_text().splitlines()]
        if asked.out.exists()
        else []
    )
    for name, (kind, recipe) in RECIPES.items():
        if asked.only and not any(part in name for part in asked.only.split(",")):
            continue
        given = {
            "name": name,
            "model": Path(asked.model).name,
            "dtype": asked.dtype,
            "recipe": f"{recipe},calibration={asked.calibration}",
            "tasks": asked.tasks,
            "limit": asked.limit,
        }
        if any(all(row.get(k) == v for k, v in given.items()) for row in rows):
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "exported"
            words = f"pretrained={asked.model},{given['recipe']},dtype={asked.dtype}"
            try:
                ours, mine, first = run(
                    sys.executable,
                    ["--model", kind, "--model_args", f"{words},export_dir={folder}", *common],
                    Path(place) / "ours",
                )
            except SystemExit as error:
                print(name, "refused:", str(error).strip().splitlines()[-1], flush=True)
                continue
            plain = f"pretrained={folder},dtype={asked.dtype}"
            theirs, others, second = run(
                asked.plain,
                ["--model", "hf", "--model_args", plain, *common],
                Path(place) / "theirs",
            )
            exported = ours["config"]["compression"]["exported"]
        a, b = answers(mine), answers(others)
        row = {
            **given,
            "equal_scores": scores(ours) == scores(theirs),
            "samples": sum(map(len, a.values())),
            "samples_equal": sum(x == y for t in a for x, y in zip(a[t], b[t], strict=True)),
            "scores": scores(ours),
            "scores_exported": scores(theirs),
            "exported": {k: v for k, v in exported.items() if k != "folder"},
            "seconds": [round(first, 1), round(second, 1)],
            "versions": ours["config"]["compression"]["versions"],
            "machine": {"processor": platform.processor(), "cores": os.cpu_count()},
        }
        with asked.out.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        shown = {k: row[k] for k in ("name", "equal_scores", "samples", "samples_equal", "seconds")}
        print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
