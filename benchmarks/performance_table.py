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


def main() -> None:
    """Run the command line."""
    page = PAGE.read_text()
    PAGE.write_text(PLACE.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], page))


if __name__ == "__main__":
    main()
