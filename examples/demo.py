"""The main job in one file: evaluate a real model dense and compressed, side by side.

usage: python examples/demo.py [--method wanda] [--sparsity 0.5] [--limit N]

Runs without a model hub: the model comes from an installed package, the calibration text is
written by the model itself, and the tasks are part of this project.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import lm_eval
from rich.console import Console
from rich.table import Table

import lm_calib_plugin

METRICS = ("acc", "acc_norm", "exact_match", "bits_per_byte")


def evaluate(model: str, arguments: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Run the demo tasks through the harness, as `lm_eval` would."""
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["calib_demo"],
        batch_size=16,
        device="cpu",
        limit=limit,
        bootstrap_iters=0,
    )


def scores(results: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Return (task, metric) -> score, without standard errors."""
    return {
        (task, metric): values[key]
        for task, values in results["results"].items()
        for key in values
        if (metric := key.partition(",")[0]) in METRICS
    }


def main() -> None:
    """Evaluate twice and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int, default=None, help="items of each task")
    options = parser.parse_args()
    start = time.time()
    base = {"pretrained": str(lm_calib_plugin.builtin_model("smollm2-135m")), "dtype": "float32"}
    recipe = {
        "method": options.method,
        "sparsity": options.sparsity,
        "calibration": options.calibration,
        "nsamples": options.nsamples,
        "seqlen": options.seqlen,
    }
    dense = evaluate("hf", base, options.limit)
    compressed = evaluate("calib_pruned", base | recipe, options.limit)

    console = Console()
    table = Table(title="SmolLM2-135M-Instruct, dense and compressed on load")
    for column in ("task", "metric", "dense", f"{options.method} {options.sparsity:.0%}"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    after = scores(compressed)
    for (task, metric), value in scores(dense).items():
        table.add_row(task, metric, f"{value:.3f}", f"{after[task, metric]:.3f}")
    console.print(table)
    found = compressed["config"]["compression"]
    error = found["error"]
    console.print("compression", style="bold")
    for name, value in {
        "key": found["key"],
        "calibration": f"{found['calibration']['calib_id'][:16]} "
        f"({found['calibration']['tokens']} tokens)",
        "removed": f"{found['achieved']['sparsity']:.4%} of the targeted layers, "
        f"{found['achieved']['sparsity_model']:.2%} of the model",
        "layer error, median": ", ".join(
            f"{values['median']:.4f} on {kind} tokens" for kind, values in error.items() if values
        ),
        "seconds": ", ".join(f"{k} {v:.1f}" for k, v in found["seconds"].items()),
        "peak memory": f"{found['peak_memory_gib']} GiB",
        "layers": found["report_file"],
    }.items():
        console.print(f"  {name}: {value}", highlight=False, soft_wrap=True)
    console.print(f"whole demo: {time.time() - start:.0f} s", style="bold")


if __name__ == "__main__":
    main()
