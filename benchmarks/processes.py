"""Seconds of one compression in one process and in several, one thread each, in one run.

    python benchmarks/processes.py MODEL file:TEXT.jsonl OUT.json [--processes 2] \
        [--nsamples 32] [--seqlen 512] [--recipe 'wanda;sparsity=0.5' ...] [--repeats 3]

One process and ``--processes`` take turns, each in processes of their own with one thread
(``OMP_NUM_THREADS=1``) and the variables that ``torchrun`` sets. Loading does not count.
``passes`` are the seconds of the calibration passes (capture, observe, propagate), ``exchange``
those in which processes wait for each other and send; of several processes the largest counts.
Repeats are kept; ratios are those of the shortest times. ``cpu`` is the time of the processor in
all of the compression, which says most where other programs run. All processes must hold the same
weights, else nothing is written; how far they are from those of one process is told.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PASSES = ("capture", "observe", "propagate")
RECIPES = ("wanda;sparsity=0.5", "sparsegpt;sparsity=0.5")


def work(given: argparse.Namespace) -> None:
    """Compress in this process, which is one of ``WORLD_SIZE``, and write what it took."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lm_calib_plugin import Recipe, Runtime, compress

    torch.set_num_threads(1)
    several = int(os.environ["WORLD_SIZE"]) > 1
    if several:
        torch.distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    method, *options = given.recipe[0].split(";")
    recipe = Recipe.from_model_args(
        {
            "method": method,
            "calibration": given.calibration,
            "nsamples": given.nsamples,
            "seqlen": given.seqlen,
            **dict(option.split("=", 1) for option in options),
        }
    )
    if several:
        torch.distributed.barrier()
    begun, spent = time.perf_counter(), time.process_time()
    runtime = Runtime(
        progress=False, report_dir=str(given.out), calib_batch_size=given.calib_batch_size
    )
    report = compress(model, tokenizer, recipe, runtime)
    total, spent = time.perf_counter() - begun, time.process_time() - spent
    rank = os.environ["RANK"]
    found = {
        "digest": report.weights_digest,
        "total": total,
        "cpu": spent,
        "stages": report.seconds,
        "processes": report.processes,
    }
    (given.out / f"{rank}.json").write_text(json.dumps(found))
    if rank == "0":
        torch.save([p.detach() for p in model.parameters()], given.out / "weights.pt")
    if several:
        torch.distributed.destroy_process_group()


def together(count: int, recipe: str, given: argparse.Namespace, folder: Path) -> list[Any]:
    """Return what each of ``count`` processes took; the first leaves its weights in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shape = ["--nsamples", str(given.nsamples), "--seqlen", str(given.seqlen), "--work"]
    shape += ["--recipe", recipe, "--calib-batch-size", given.calib_batch_size]
    command = [sys.executable, __file__, given.model, given.calibration, str(folder), *shape]
    running = []
    for rank in range(count):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(command, env={**os.environ, **group, **place}))
    if any([process.wait() for process in running]):
        raise SystemExit(f"{recipe}: a process failed")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def seconds(found: list[Any]) -> dict[str, Any]:
    """Return the seconds of one run: of each kind the longest of its processes."""
    stages = {name for one in found for name in one["stages"]}
    longest = {s: max(one["stages"].get(s, 0.0) for one in found) for s in sorted(stages)}
    passes = max(sum(one["stages"].get(s, 0.0) for s in PASSES) for one in found)
    return {
        "passes": round(passes, 2),
        "exchange": round(longest.get("exchange", 0.0), 2),
        "total": round(max(one["total"] for one in found), 2),
        "cpu": round(max(one["cpu"] for one in found), 2),
        "stages": {name: round(value, 2) for name, value in longest.items()},
    }


def difference(one: Path, other: Path) -> dict[str, float]:
    """Return how far weights are apart: share that differs, and the norm of the difference."""
    import torch

    first, second = (torch.load(x / "weights.pt", weights_only=True) for x in (one, other))
    unlike = sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))
    size = sum(float(a.double().square().sum()) for a in first)
    gap = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(first, second, strict=True)
    )
    return {"share": unlike / sum(a.numel() for a in first), "norm": (gap / size) ** 0.5}


def measured(recipe: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and weights of one recipe, in one process and in several."""
    runs: dict[int, list[dict[str, Any]]] = {1: [], given.processes: []}
    digests: dict[int, set[str]] = {count: set() for count in runs}
    tokens = None
    with tempfile.TemporaryDirectory() as place:
        folders = {count: Path(place) / str(count) for count in runs}
        for repeat in range(given.repeats):
            # Turn about, so that what the machine does besides meets both.
            for count in sorted(runs, reverse=bool(repeat % 2)):
                folders[count].mkdir(exist_ok=True)
                found = together(count, recipe, given, folders[count])
                runs[count].append(seconds(found))
                digests[count] |= {one["digest"] for one in found}
                tokens = found[0]["processes"] or tokens
                print(recipe, f"{count} processes", runs[count][-1], flush=True)
        apart = difference(*folders.values())
    if any(len(found) > 1 for found in digests.values()):
        raise SystemExit(f"{recipe}: different weights: {digests}")

    def shortest(count: int, *kinds: str) -> float:
        return min(sum(run[kind] for kind in kinds) for run in runs[count])

    return {
        "recipe": recipe,
        "processes": tokens,
        "runs": {str(count): found for count, found in runs.items()},
        "times_as_fast": {
            "passes": round(shortest(1, "passes") / shortest(given.processes, "passes"), 3),
            "passes_and_exchange": round(
                shortest(1, "passes") / shortest(given.processes, "passes", "exchange"), 3
            ),
            "total": round(shortest(1, "total") / shortest(given.processes, "total"), 3),
            "cpu": round(shortest(1, "cpu") / shortest(given.processes, "cpu"), 3),
        },
        "identical_to_one_process": digests[1] == digests[given.processes],
        "difference_from_one_process": apart,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--calib-batch-size", default="auto")
    parser.add_argument("--recipe", action="append", metavar="METHOD[;FIELD=VALUE...]")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given)
        return
    rows = [measured(recipe, given) for recipe in given.recipe or RECIPES]
    os.environ["OMP_NUM_THREADS"] = "1"
    from machine import facts

    result = {
        "model": Path(given.model).name,
        "calibration": {"nsamples": given.nsamples, "seqlen": given.seqlen},
        "recipes": rows,
        "machine": facts(),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(row["recipe"], row["times_as_fast"])


if __name__ == "__main__":
    main()
