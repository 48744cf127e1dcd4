"""Scores of a model compressed on load, and of its exported folder in an environment without us.

    python benchmarks/export_roundtrip.py MODEL OUT.jsonl --tasks T1,T2 --include-path DIR
        [--limit 40] [--plain /path/to/other/venv/bin/python] [--only wanda,gptq] [--dtype float32]
        [--calibration c4,nsamples=16,seqlen=256]

For every recipe: the harness with ``calib_*`` and ``export_dir=DIR``, then with ``hf`` on the
folder by the other Python (which must not have this package; default: this one). Compared are
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
    "rtn W4": ("calib_quantized", "method=rtn,bits=4,group_size=G"),
    "gptq W3": ("calib_quantized", "method=gptq,bits=3,group_size=G"),
    "gptq W3 asymmetric, dense": (
        "calib_quantized",
        "method=gptq,bits=3,group_size=G,symmetric=false,export_format=dense",
    ),
    "awq W4": ("calib_quantized", "method=awq,bits=4,group_size=G"),
    "rotation+gptq W4": ("calib_quantized", "method=rotation,bits=4,group_size=G"),
    "gptq bits=auto:4": ("calib_quantized", "method=gptq,bits=auto:4,group_size=G"),
    "W8A8 dynamic": ("calib_quantized", "method=rtn,scheme=W8A8"),
    "W8A8 static": ("calib_quantized", "method=rtn,scheme=W8A8_static"),
    "smoothquant W8A8": ("calib_quantized", "method=smoothquant,scheme=W8A8"),
    "FP8 dynamic": ("calib_quantized", "method=rtn,scheme=FP8"),
    "sparsegpt+gptq 50% W4": ("calib", "method=sparsegpt+gptq,sparsity=0.5,bits=4,group_size=G"),
}


# As lm_eval does, without the index of the harness' own tasks, which takes a minute to read.
CODE = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
task = json.load(sys.stdin)
if task["ours"]:
    import lm_calib_plugin
manager = TaskManager(include_path=task.pop("include_path"), include_defaults=False)
out, ours = task.pop("out"), task.pop("ours")
found = lm_eval.simple_evaluate(task_manager=manager, device="cpu", bootstrap_iters=0, **task)
if not ours:
    assert not any(name.partition(".")[0] == "lm_calib_plugin" for name in sys.modules)
keys = ("results", "config", "samples")
json.dump({k: found[k] for k in keys}, open(out, "w"), default=str)
"""


def run(python: str, task: dict[str, Any], out: Path) -> tuple[dict[str, Any], float]:
    """Evaluate in a process of its own; return what the harness says, and seconds."""
    start = time.perf_counter()
    env = dict(os.environ)
    ours = "calib" in task["model"]
    if not ours:
        env.pop("PYTHONPATH", None)
    given = json.dumps({**task, "out": str(out), "ours": ours})
    command = [python, "-c", CODE]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(out.read_text()), time.perf_counter() - start


def scores(results: dict[str, Any]) -> dict[str, Any]:
    return {
        task: {k: v for k, v in values.items() if not k.startswith("name")}
        for task, values in results["results"].items()
    }


def answers(found: dict[str, Any]) -> dict[str, list[Any]]:
    return {t: [row["filtered_resps"] for row in rows] for t, rows in found["samples"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--include-path", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--plain", default=sys.executable)
    parser.add_argument("--only")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--calibration", default="random,nsamples=20,seqlen=128")
    asked = parser.parse_args()
    common: dict[str, Any] = {
        "tasks": asked.tasks.split(","),
        "include_path": asked.include_path,
        "limit": asked.limit,
    }
    rows = (
        [json.loads(line) for line in asked.out.read_text().splitlines()]
        if asked.out.exists()
        else []
    )
    for name, (kind, template) in RECIPES.items():
        recipe = template.replace("group_size=G", f"group_size={asked.group_size}")
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
            words += f",export_dir={folder},progress=false"
            try:
                ours, first = run(
                    sys.executable,
                    {**common, "model": kind, "model_args": words},
                    Path(place) / "ours.json",
                )
            except SystemExit as error:
                print(name, "refused:", str(error).strip().splitlines()[-1], flush=True)
                continue
            plain = f"pretrained={folder},dtype={asked.dtype}"
            theirs, second = run(
                asked.plain,
                {**common, "model": "hf", "model_args": plain},
                Path(place) / "theirs.json",
            )
            exported = ours["config"]["compression"]["exported"]
        a, b = answers(ours), answers(theirs)
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
