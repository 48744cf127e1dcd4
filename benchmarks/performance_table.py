"""Write the tables of docs/performance.md from the files in benchmarks/results.

    python benchmarks/performance_table.py

What stands between ``<!-- table NAME -->`` and ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {}


def table(made: Callable[[], str]) -> Callable[[], str]:
    """Register a function that makes the table of its name."""
    TABLES[made.__name__] = made
    return made


def read(name: str) -> Any:
    """Return what a benchmark wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table, numbers to the right."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("| --- |" + " ---: |" * (len(head) - 1))
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def machine(facts: dict[str, Any]) -> str:
    """Return one line about a machine."""
    what = [facts.get("gpu") or facts["cpu"], f"{facts['threads']} threads"]
    what += [f"torch {facts['torch']}", f"transformers {facts['transformers']}"]
    return "\n" + ", ".join(what) + f"; load at the end {facts['load']}.\n"


def stages(row: dict[str, Any]) -> list[str]:
    """Return seconds of the stages that take any."""
    found = row.get("stages", {})
    passes = found.get("capture", 0) + found.get("observe", 0) + found.get("propagate", 0)
    rest = row["seconds"] - passes - found.get("compress", 0)
    watching = f"{found.get('observe', 0):.1f}", f"{found.get('propagate', 0):.1f}"
    return [*watching, f"{found.get('compress', 0):.1f}", f"{rest:.1f}"]


@table
def compression_time() -> str:
    """Whole compressions over plain passes, floors and peers."""
    found = read("compression_time_smollm2")
    head = ["run", "seconds", "watch", "propagate", "solve", "other"]
    head += ["over two plain passes", "over the floor", "over the peer", "peak GiB"]
    rows = []
    for row in found["rows"]:
        if row["run"] == "plain":
            rows.append(["two plain passes", f"{row['seconds']:.1f}", *[""] * 8])
            continue
        name = row["run"] + (f" ({row['peer']})" if "peer" in row else "")
        parts = [""] * 4 if "peer" in row else stages(row)
        over = [f"{row['over_plain']:.2f}", f"{row['over_floor']:.2f}"]
        peers = row.get("over_peer", {})
        peer = ", ".join(f"{ratio:.2f}" for ratio in peers.values())
        peak = f"{row['peak_rss_gib']:.2f}"
        rows.append([name, f"{row['seconds']:.1f}", *parts, *over, peer, peak])
    least = found["floors"]
    rates = found["rates"]
    floor = (
        f"Floors: two passes {least['two_passes']:.1f} s, Gram matrices {least['gram']:.1f} s, "
        f"weights {least['weights']:.2f} s, at {rates['flops'] / 1e9:.0f} GFLOP/s and "
        f"{rates['bandwidth'] / 1e9:.0f} GB/s measured before.\n"
    )
    return markdown(head, rows) + "\n" + floor + machine(found["machine"])


@table
def peers_two_blocks() -> str:
    """Slower peers, on two blocks."""
    found = read("compression_time_peers")
    rows = [
        [
            row["run"] + (f" ({row['peer']})" if "peer" in row else ""),
            f"{row['seconds']:.1f}",
            f"{row['over_plain']:.2f}",
            ", ".join(f"{x:.2f}" for x in row.get("over_peer", {}).values()),
        ]
        for row in found["rows"]
        if row["run"] != "plain"
    ]
    head = ["run", "CPU seconds", "over two plain passes", "over the peer"]
    return markdown(head, rows) + machine(found["machine"])


@table
def growth() -> str:
    """CPU seconds over plain passes as one size grows."""
    found = read("growth")
    rows = [
        [
            row["method"],
            row["grows"],
            row["tokens"],
            row["width"],
            row["depth"],
            f"{row['cpu_seconds']:.2f}",
            f"{row['over_plain']:.2f}",
        ]
        for row in found["rows"]
    ]
    head = ["method", "grows", "tokens", "width", "blocks", "CPU seconds", "over two plain passes"]
    return markdown(head, rows) + machine(found["machine"])


@table
def shared_cells() -> str:
    """Seconds of the cells of a grid, alone and with shared statistics."""
    found = read("shared_cells_smollm2")
    rows = [
        [
            row["cell"].replace("|", "\\|"),
            f"{row['alone']['seconds']:.1f}",
            f"{row['shared']['seconds']:.1f}",
            f"{row['shared']['stages'].get('observe', 0):.1f}",
            f"{row['shared']['stages'].get('compress', 0):.1f}",
        ]
        for row in found["cells"]
    ]
    sums = found["seconds"]
    rows.append(["all", f"{sums['alone']:.1f}", f"{sums['shared']:.1f}", "", ""])
    head = ["cell", "alone, seconds", "shared, seconds", "of which watch", "solve"]
    size = found["calibration"]
    said = (
        f"\n{size['nsamples']} x {size['seqlen']} tokens. All cells shared take "
        f"{found['shared_over_slowest_alone']:.2f} x the time of `{found['slowest_alone']}` "
        f"alone; without sharing they take {found['ratio']:.2f} x as long. Statistics held: "
        f"{found['held_mib']:.0f} MiB. Weights are the same bits in both.\n"
    )
    return markdown(head, rows) + said + machine(found["machine"])


@table
def processes() -> str:
    """How much faster several processes of one thread are than one."""
    found = read("processes_smollm2")
    rows = []
    for row in found["recipes"]:
        for count, runs in row["runs"].items():
            best = min(runs, key=lambda run: run["passes"])
            cells = [f"{best[key]:.1f}" for key in ("passes", "exchange", "total")]
            rows.append([f"{row['recipe']}, {count} process" + "es" * (count != "1"), *cells])
        times = row["times_as_fast"]
        same = (
            "the same bits"
            if row["identical_to_one_process"]
            else (f"weights {row['difference_from_one_process']['norm']:.1e} apart")
        )
        rows.append(
            [f"times as fast; {same}", f"{times['passes']:.2f}", "", f"{times['total']:.2f}"]
        )
    head = ["run", "calibration passes", "exchange", "total"]
    size = found["calibration"]
    said = f"\n{size['nsamples']} x {size['seqlen']} tokens, seconds of the slowest process.\n"
    return markdown(head, rows) + said + machine(found["machine"])


@table
def streaming() -> str:
    """Peak memory of models in memory and on a disk."""
    found = read("streaming_memory")
    rows = [
        [
            row["where"],
            row["method"],
            row["depth"],
            f"{row['model_mib']:.0f}",
            f"{row['peak_mib']:.0f}",
            f"{row['floor_mib']:.0f}",
        ]
        for row in found["rows"]
    ]
    head = ["weights", "method", "blocks", "model, MiB", "peak, MiB", "floor, MiB"]
    return markdown(head, rows) + machine(found["machine"])


@table
def full_size() -> str:
    """A full-size model on a GPU, or as far as this machine goes."""
    found = read("full_size")
    rows = [
        [
            row["method"],
            f"{row['seconds']:.2f}",
            row["aim"] or "",
            f"{sum(row['floors'].values()):.2f}",
            f"{row['over_floor']:.2f}",
        ]
        for row in found["rows"]
    ]
    shape = found["shape"]
    said = (
        f"\nHidden {shape['hidden_size']}, inner {shape['intermediate_size']}, "
        f"{shape['num_hidden_layers']} blocks. Sweeps of all layers alone: "
        f"{found['sweeps_alone']:.2f} s; the sweep differs from float64 by "
        f"{found['sweep_against_float64']:.1e}.\n"
    )
    head = ["method", "seconds", "aim", "floor", "over the floor"]
    return markdown(head, rows) + said + machine(found["machine"])


def filled(page: str) -> str:
    """Return a page with every table as the results say now."""
    return PLACE.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], page)


def main() -> None:
    """Run the command line."""
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
