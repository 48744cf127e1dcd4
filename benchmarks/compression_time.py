"""Seconds of whole compressions over plain forward passes of the same tokens, beside peers.

    export OMP_NUM_THREADS=2
    python benchmarks/compression_time.py MODEL tokens.json OUT.json \
        --run wanda --run sparsegpt --run 'gptq;bits=3;group_size=64' --run swap_pcg \
        --peer llmcompressor=/path/to/its/python

One process after the other: two plain passes, then each method of ours, of the peer's where it has
it, and two plain passes again, so that what else the machine does shows in both. ``over_plain`` is
seconds over those of two plain passes (the mean of before and after), ``over_floor`` over the least
that two passes, the Gram matrices and the weights can take at measured rates.

With ``--one RUN`` the process does one of them and prints its line.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import copy_rate, facts, floors, matmul_rate
from perplexity import perplexities
from transformers import AutoModelForCausalLM

# Peers, by name: their script, and which of our methods they have.
PEERS = {
    "llmcompressor": "llm_compressor_peer.py",
    "auto_round": "autoround_peer.py",
    "neural_compressor": "neural_compressor_peer.py",
}
KNOWN = {
    "llmcompressor": ("wanda", "sparsegpt", "gptq"),
    "auto_round": ("autoround",),
    "neural_compressor": ("gptq",),
}
DEFAULTS = {"wanda": "sparsity=0.5", "sparsegpt": "sparsity=0.5", "swap_pcg": "sparsity=0.5"}


def plain(model: Any, windows: torch.Tensor, clock: Any, chunk: int = 8) -> float:
    """Return the seconds of one forward pass through all blocks, without the head."""
    with torch.inference_mode():
        model.model(windows[:1], use_cache=False)
        start = clock()
        for part in windows.split(chunk):
            model.model(part, use_cache=False)
        return float(clock() - start)


def one(given: argparse.Namespace) -> dict[str, Any]:
    """Do one thing in this process; return its row."""
    clock = time.process_time if given.cpu else time.perf_counter
    tokens = json.loads(given.tokens.read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    if given.blocks:
        model.model.layers = model.model.layers[: given.blocks]
        model.config.num_hidden_layers = given.blocks
    if given.one == "plain":
        windows = torch.tensor(tokens["calib"])
        return {
            "run": "plain",
            "seconds": plain(model, windows, clock) + plain(model, windows, clock),
        }
    from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress

    method, *options = given.one.split(";")
    fields = dict(option.split("=", 1) for option in options)
    if not options and method in DEFAULTS:
        fields = dict([DEFAULTS[method].split("=", 1)])
    calibration = CalibrationSet.of(tokens["calib"], seqlen=max(map(len, tokens["calib"])))
    runtime = Runtime(progress=False, report_dir=tempfile.mkdtemp())
    start = clock()
    report = compress(
        model, None, Recipe.from_model_args({"method": method, **fields}), runtime, calibration
    )
    taken = clock() - start
    row = {
        "run": given.one,
        "seconds": taken,
        "stages": {name: round(value, 2) for name, value in report.seconds.items()},
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "weights": report.weights_digest[:12],
    }
    if given.perplexity:
        with torch.inference_mode():
            row["perplexity"] = perplexities(model, tokens["evals"])
    return row


def spawn(python: str, *arguments: str) -> dict[str, Any]:
    """Run a process of its own; its last line of output is a row."""
    done = subprocess.run([python, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--run", action="append", metavar="METHOD[;KEY=VALUE...]")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--blocks", type=int, default=0, help="only the first ones")
    parser.add_argument("--perplexity", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds, for a busy machine")
    parser.add_argument("--one")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given)))
        return
    flags = ["--blocks", str(given.blocks)]
    flags += ["--perplexity"] * given.perplexity + ["--cpu"] * given.cpu
    own = [__file__, given.model, str(given.tokens), *flags]
    peers = dict(text.split("=", 1) for text in given.peer)
    rates = {"flops": matmul_rate(torch.float32), "bandwidth": copy_rate()}
    rows = [spawn(sys.executable, *own, "--one", "plain")]
    for run in given.run:
        rows.append(spawn(sys.executable, *own, "--one", run))
        for name, python in peers.items():
            method = run.split(";")[0]
            if method in KNOWN[name]:
                path = str(Path(__file__).parent / "peers" / PEERS[name])
                theirs = [method, given.model, str(given.tokens), *flags]
                rows.append({**spawn(python, path, *theirs), "run": run, "peer": name})
        rows.append(spawn(sys.executable, *own, "--one", "plain"))
    given.out.write_text(json.dumps(summary(given, rows, rates), indent=1) + "\n")


def summary(
    given: argparse.Namespace, rows: list[dict[str, Any]], rates: dict[str, float]
) -> dict[str, Any]:
    """Put every run over the plain passes around it, over its floor, and over its peer."""
    model = AutoModelForCausalLM.from_pretrained(given.model)
    windows = json.loads(given.tokens.read_text())["calib"]
    if given.blocks:
        model.config.num_hidden_layers = given.blocks
    blocks = list(model.model.layers)[: given.blocks or None]
    size = sum(4 * p.numel() for block in blocks for p in block.parameters())
    least = floors(
        model.config, sum(map(len, windows)), len(windows[0]), size, rates["flops"],
        rates["bandwidth"],
    )  # fmt: skip
    places = [i for i, row in enumerate(rows) if row["run"] == "plain"]
    for i, row in enumerate(rows):
        if row["run"] == "plain":
            continue
        around = [max(p for p in places if p < i), min(p for p in places if p > i)]
        base = sum(rows[p]["seconds"] for p in around) / 2
        gram = 0.0 if row["run"].startswith("wanda") else least["gram"]
        row["over_plain"] = row["seconds"] / base
        row["over_floor"] = row["seconds"] / (least["two_passes"] + gram + least["weights"])
        theirs = [r for r in rows if r.get("peer") and r["run"] == row["run"]]
        if theirs and "peer" not in row:
            row["over_peer"] = {r["peer"]: row["seconds"] / r["seconds"] for r in theirs}
    return {
        "model": Path(given.model).name,
        "tokens": [len(windows), len(windows[0])],
        "floors": least,
        "rates": rates,
        "clock": "cpu" if given.cpu else "wall",
        "machine": facts(),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
