"""Methods x calibration sets x draws on one model: perplexity, layer errors, seconds.

    python benchmarks/quantization_sets.py MODEL OUT.jsonl --evaluate wiki=WIKI.raw
        --source c4=c4?path=C4.jsonl --source self=self --source random=null:random
        --run 'rtn;bits=3;group_size=64' --run 'gptq;bits=3;group_size=64' --draws 5

Sources are calibration expressions; every draw is a seed, and all methods see the same draws.
With ``--fold`` the calibration takes the fold ``choose`` of its documents. Instead of
``--evaluate`` (the first ``--windows`` windows of a plain text) ``--judge EXPRESSION`` evaluates on
documents of the fold ``judge``; ``--tokens FILE`` (of ``tokens.py``) gives the evaluation windows
and the source ``shared``. What uses no data is run once.

One line a cell goes to OUT.jsonl, at once, with the mean loss of every window; cells that are there
already are left out. ``--table`` prints what is there as Markdown.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from calibration_sets import window_losses
from pruning_levels import mean, run_missing, spread
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress
from lm_calib_plugin.calibration import build_calibration

QUIET = Runtime(progress=False)
Windows = dict[str, list[torch.Tensor]]


def recipe_of(run: str, given: argparse.Namespace) -> Recipe:
    """Return the recipe of ``method;key=value;key=value``."""
    method, *options = run.split(";")
    common = [*given.common, *options]
    fields: dict[str, Any] = dict(option.split("=", 1) for option in common)
    return Recipe(method=method, **fields)


def cells(given: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield method with options, name of the source, and draw."""
    names = [text.partition("=")[0] for text in given.source]
    for run in given.run:
        if run == "dense" or not recipe_of(run, given).needs_data:
            yield run, "none", 0
            continue
        yield from ((run, name, draw) for name in names for draw in range(given.draws))


@functools.cache
def shared(path: Path) -> dict[str, Any]:
    """Return the content of a tokens file."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


_SETS: dict[tuple[str, int], CalibrationSet] = {}


def calibration_of(name: str, draw: int, given: argparse.Namespace) -> CalibrationSet:
    """Return one draw of a source; made once."""
    if (name, draw) in _SETS:
        return _SETS[name, draw]
    expression = dict(text.split("=", 1) for text in given.source)[name]
    if expression == "shared":
        windows = shared(given.tokens)["calib"]
        made = CalibrationSet.of(windows, seqlen=max(map(len, windows)))
    else:
        made = drawn(expression, given, given.nsamples, draw, "choose" if given.fold else "all")
    _SETS[name, draw] = made
    return made


def drawn(
    expression: str, given: argparse.Namespace, count: int, seed: int, fold: str
) -> CalibrationSet:
    """Return a calibration set of the dense model."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    recipe = Recipe(
        method="wanda",
        sparsity=0.5,
        calibration=expression,
        nsamples=count,
        seqlen=given.seqlen,
        calib_seed=seed,
        fold=fold,
    )
    with torch.no_grad():
        return build_calibration(
            recipe,
            tokenizer,
            model.eval(),
            seqlen=given.seqlen,
            model_id="",
            vocab_size=model.get_input_embeddings().weight.shape[0],
            runtime=QUIET,
        )


@functools.cache
def _evaluated(model: str, texts: tuple[str, ...], count: int, length: int) -> Windows:
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = {}
    for text in texts:
        name, path = text.split("=", 1)
        ids = tokenizer(Path(path).read_text(), add_special_tokens=False)["input_ids"]
        cut = torch.tensor(ids[: count * length])
        found[name] = list(cut[: len(cut) // length * length].reshape(-1, length))
    return found


def evaluated(given: argparse.Namespace) -> Windows:
    """Return the windows that are scored."""
    if given.tokens:
        texts = shared(given.tokens)["evals"]
        return {k: [torch.tensor(w) for w in v[: given.windows]] for k, v in texts.items()}
    found = _evaluated(given.model, tuple(given.evaluate), given.windows, given.seqlen)
    for text in given.judge:
        name, expression = text.split("=", 1)
        if name not in found:
            made = drawn(expression, given, given.windows, 0, "judge")
            found[name] = list(made.sequences)
    return found


def measured(run: str, source: str, draw: int, given: argparse.Namespace) -> dict[str, Any]:
    """Compress once and score."""
    windows = evaluated(given)
    row: dict[str, Any] = {"run": run, "source": source, "draw": draw}
    calibration = None if source == "none" else calibration_of(source, draw, given)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    if run != "dense":
        start = time.perf_counter()
        report = compress(model, None, recipe_of(run, given), QUIET, calibration)
        row |= {
            "seconds": round(time.perf_counter() - start, 2),
            "stages": {k: round(v, 2) for k, v in report.seconds.items()},
            "achieved": report.achieved,
            "error": {
                kind: mean([getattr(layer, f"error_{kind}") for layer in report.layers])
                for kind in ("calibration", "heldout")
            },
            "warnings": report.warnings,
            "calib_id": (report.calibration or {}).get("calib_id"),
            "key": report.key,
            "peak_memory_gib": report.peak_memory_gib,
        }
    start = time.perf_counter()
    losses = {name: window_losses(model, list(w)) for name, w in windows.items()}
    return row | {
        "losses": {name: [round(x, 6) for x in found] for name, found in losses.items()},
        "perplexity": {name: math.exp(statistics.fmean(x)) for name, x in losses.items()},
        "evaluation_seconds": round(time.perf_counter() - start, 1),
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown: one line a run, one column a source, mean ± standard deviation of draws.

    On the windows that all rows have scored: some may have been run with fewer.
    """
    texts = list(rows[0]["losses"])
    count = min(len(losses) for row in rows for losses in row["losses"].values())

    def scored(row: dict[str, Any], text: str) -> float:
        return math.exp(statistics.fmean(row["losses"][text][:count]))

    sources = list(dict.fromkeys(row["source"] for row in rows if row["source"] != "none"))
    lines = []
    for text in texts:
        lines += [
            f"{text} ({count} windows):",
            "",
            "| run | " + " | ".join(sources or ["perplexity"]) + " |",
            "| --- " * (1 + max(1, len(sources))) + "|",
        ]
        for run in dict.fromkeys(row["run"] for row in rows):
            own = [row for row in rows if row["run"] == run]
            if own[0]["source"] == "none":
                lines.append(f"| {run} | {scored(own[0], text):.4g} |")
                continue
            found = [[scored(r, text) for r in own if r["source"] == s] for s in sources]
            shown = [spread(values) if values else "" for values in found]
            lines.append(f"| {run} | " + " | ".join(shown) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--source", action="append", default=[], metavar="NAME=EXPRESSION")
    parser.add_argument("--evaluate", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--judge", action="append", default=[], metavar="NAME=EXPRESSION")
    parser.add_argument("--fold", action="store_true")
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--run", action="append", default=[], metavar="METHOD[;KEY=VALUE...]")
    parser.add_argument("--common", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    rows = run_missing(given, cells(given), ("run", "source", "draw"), measured)
    if given.table:
        print(table(rows))


if __name__ == "__main__":
    main()
