"""Methods x levels x draws on one model: perplexity, layer errors, seconds.

    python benchmarks/pruning_levels.py MODEL OUT.jsonl --tokens DRAW0.json [DRAW1.json ...]
        --run wanda --run 'swap_pcg' --run 'wanda;update=obs' --level 0.5 --level 2:4

A tokens file is one of ``tokens.py``; its position is the number of the draw. Instead of files,
``--text FILE --split MARK`` cuts windows from documents: calibration windows from those of the fold
``choose``, evaluation windows from those of the fold ``judge``, ``--draws N`` seeds.

One line a cell goes to OUT.jsonl, at once; cells that are there already are left out, so a study
that was stopped goes on where it was. ``--table`` prints what is there as Markdown.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from perplexity import perplexities
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress
from lm_calib_plugin.calibration import build_calibration

Tokens = dict[str, Any]


def cells(given: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield method with options, level and draw; what uses no data has one draw."""
    draws = len(given.tokens) if given.tokens else given.draws
    if "dense" in given.run:
        yield "dense", "0", 0
    for level in given.level:
        for run in given.run:
            for draw in range(draws) if run != "dense" else ():
                if draw == 0 or recipe_of(run, level, given).needs_data:
                    yield run, level, draw


def recipe_of(run: str, level: str, given: argparse.Namespace) -> Recipe:
    """Return the recipe of ``method;key=value;key=value`` at one level."""
    method, *options = run.split(";")
    if "=" in level:
        strength = dict([level.split("=")])
    else:
        strength = {"pattern": level} if ":" in level else {"sparsity": level}
    common = dict(option.split("=", 1) for option in given.common)
    fields: dict[str, Any] = dict(option.split("=", 1) for option in options)
    return Recipe(method=method, **strength, **{**common, **fields})


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def documents(given: argparse.Namespace) -> Path:
    """Write the text's documents as lines of JSON; return the file."""
    path = Path(_folder().name) / "documents.jsonl"
    if not path.exists():
        found = [part.strip() for part in Path(given.text).read_text().split(given.split)]
        path.write_text("".join(json.dumps({"text": part}) + "\n" for part in found if part))
    return path


def windows(given: argparse.Namespace, fold: str, count: int, seed: int) -> list[list[int]]:
    """Cut windows of tokens from documents of a fold."""
    recipe = Recipe(
        method="wanda",
        sparsity=0.5,
        calibration=f"file:{documents(given)}",
        fold=fold,
        nsamples=count,
        seqlen=given.seqlen,
        calib_seed=seed,
    )
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    found = build_calibration(
        recipe,
        tokenizer,
        None,
        seqlen=given.seqlen,
        model_id="",
        vocab_size=len(tokenizer),
        runtime=Runtime(progress=False),
    )
    return [ids.tolist() for ids in found.sequences]


def tokens_of(given: argparse.Namespace, draw: int) -> Tokens:
    """Return calibration and evaluation windows of a draw."""
    if given.tokens:
        read: Tokens = json.loads(given.tokens[draw].read_text())
        return read
    return {
        "calib": windows(given, "choose", given.nsamples, draw),
        "evals": {Path(given.text).stem: windows(given, "judge", given.windows, 0)},
    }


def measured(run: str, level: str, draw: int, given: argparse.Namespace) -> dict[str, Any]:
    """Compress once and score."""
    tokens = tokens_of(given, draw)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    row: dict[str, Any] = {"run": run, "level": level, "draw": draw}
    if run != "dense":
        recipe = recipe_of(run, level, given)
        seqlen = max(map(len, tokens["calib"]))
        calibration = CalibrationSet.of(tokens["calib"], seqlen=seqlen)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            report = compress(
                model,
                None,
                recipe,
                Runtime(report_dir=folder, progress=False),
                calibration if recipe.needs_data else None,
            )
        row |= {
            "seconds": round(time.perf_counter() - start, 2),
            "stages": {k: round(v, 2) for k, v in report.seconds.items()},
            "achieved": report.achieved,
            "error": {
                kind: mean([getattr(layer, f"error_{kind}") for layer in report.layers])
                for kind in ("calibration", "heldout")
            },
            "warnings": report.warnings,
            "key": report.key,
            "weights_digest": report.weights_digest,
            "peak_memory_gib": report.peak_memory_gib,
        }
    return row | {
        "perplexity": perplexities(model, tokens["evals"]),
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is known, None when nothing is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown: one line a run and level, means over draws (± standard deviation)."""
    texts = list(rows[0]["perplexity"])
    lines = [
        "| level | run | draws | " + " | ".join(texts) + " | layer error | held out | s |",
        "| --- " * (6 + len(texts)) + "|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["level"], row["run"]), []).append(row)
    for (level, run), own in groups.items():
        shown = [spread([r["perplexity"][t] for r in own]) for t in texts]
        for kind in ("calibration", "heldout"):
            found = mean([r.get("error", {}).get(kind) for r in own])
            shown.append("" if found is None else f"{found:.4f}")
        seconds = [r["seconds"] for r in own if "seconds" in r]
        shown.append(f"{statistics.median(seconds):.1f}" if seconds else "")
        lines.append(f"| {level} | {run} | {len(own)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Return mean, and ± standard deviation where there are several values."""
    more = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{more}"


def run_missing(
    given: argparse.Namespace,
    wanted: Iterator[tuple[str, str, int]],
    names: tuple[str, str, str],
    measure: Callable[..., dict[str, Any]],
) -> list[dict[str, Any]]:
    """Measure the cells that are not in ``given.out`` yet, each written at once; return all rows.

    ``names`` are the keys of a row that tell its cell.
    """
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {tuple(row[name] for name in names) for row in rows}
    for cell in wanted:
        if cell in done:
            continue
        rows.append(measure(*cell, given))
        with given.out.open("a") as out:
            out.write(json.dumps(rows[-1]) + "\n")
        print(*cell, rows[-1]["perplexity"], rows[-1].get("seconds"), flush=True)
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=Path, nargs="*", default=[])
    parser.add_argument("--text")
    parser.add_argument("--split", default="<|endoftext|>")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--run", action="append", default=[], metavar="METHOD[;KEY=VALUE...]")
    parser.add_argument("--level", action="append", default=[], metavar="S or N:M or KEY=VALUE")
    parser.add_argument("--common", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    rows = run_missing(given, cells(given), ("run", "level", "draw"), measured)
    if given.table:
        print(table(rows))


if __name__ == "__main__":
    main()
