"""Hold what a preflight predicted against what evaluations measured.

    python benchmarks/proxy.py preflight.json results.jsonl --level method=wanda,sparsity=0.5 \
        --json proxy.json --plot proxy.png

`preflight.json` is of `lm-calib preflight --out`, `results.jsonl` of `calibration_sets.py`. Sets
are named SOURCE-DRAW. Printed are a Markdown table (perplexity, mean and standard deviation over
draws; R predicted by the bank), Spearman's correlation of predicted and measured by domain, and
the worst domain of every source.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from lm_calib_plugin.bank.plots import Point, plot_proxy
from lm_calib_plugin.comparison import spearman, two_level_bootstrap


def rises(line: dict[str, Any], dense: dict[str, Any], domain: str) -> list[float]:
    """Return the rise of the loss of every window, in nats a token."""
    pairs = zip(line["losses"][domain], dense["losses"][domain], strict=True)
    return [after - before for after, before in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preflight", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--level", required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    predicted = {
        (e["set"], e["domain"]): e
        for e in json.loads(given.preflight.read_text())["transfer"]["entries"]
    }
    lines = [json.loads(line) for line in given.results.read_text().splitlines()]
    dense = next(line for line in lines if line["set"] == "dense")
    found = {line["set"]: line for line in lines if line["recipe"] == given.level}
    domains = list(dense["losses"])
    sources = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in found))
    content: dict[str, Any] = {"level": given.level, "table": [], "spearman": {}, "worst": []}

    print("| calibration set | draws | " + " | ".join(domains) + " |")
    print("| --- | ---: |" + " ---: |" * len(domains))
    shown = {d: math.exp(statistics.mean(dense["losses"][d])) for d in domains}
    print("| dense | | " + " | ".join(f"{shown[d]:.1f}" for d in domains) + " |")
    for source in sources:
        draws = [found[n] for n in found if n.rsplit("-", 1)[0] == source]
        cells = []
        for d in domains:
            values = [math.exp(statistics.mean(line["losses"][d])) for line in draws]
            names = [(line["set"], d) for line in draws]
            ratios = [predicted[n]["regret"] for n in names if n in predicted]
            spread = statistics.stdev(values) if len(values) > 1 else None
            row = {
                "source": source,
                "domain": d,
                "perplexity": statistics.mean(values),
                "sd": spread,
                "predicted_regret": statistics.mean(ratios) if ratios else None,
                "against_no_data": [
                    predicted[n]["against_no_data"] for n in names if n in predicted
                ],
            }
            content["table"].append(row)
            shown_spread = "" if spread is None else f" ± {spread:.1f}"
            shown_ratio = "" if not ratios else f" ({statistics.mean(ratios):.2f})"
            cells.append(f"{statistics.mean(values):.1f}{shown_spread}{shown_ratio}")
        print(f"| {source} | {len(draws)} | " + " | ".join(cells) + " |")

    points = []
    for d in domains:
        pairs = [
            (n, predicted[n, d]["error"], statistics.mean(rises(found[n], dense, d)))
            for n in found
            if (n, d) in predicted
        ]
        if len(pairs) < 4:
            continue
        result = spearman([p[1] for p in pairs], [p[2] for p in pairs])
        natural = [p for p in pairs if not p[0].startswith(("random", "ellipsis"))]
        alone = spearman([p[1] for p in natural], [p[2] for p in natural])
        content["spearman"][d] = {
            "points": len(pairs),
            "all": vars(result),
            "without_controls": vars(alone),
        }
        print(
            f"Spearman {d}: {result.value:.2f} [{result.low:.2f}, {result.high:.2f}] on "
            f"{len(pairs)} sets; without controls {alone.value:.2f} [{alone.low:.2f}, "
            f"{alone.high:.2f}]"
        )
        points += [
            Point(d, predicted[n, d]["regret"], statistics.mean(rises(found[n], dense, d)))
            for n, _, _ in pairs
            if not n.startswith("ellipsis")
        ]
    for source in sources:
        draws = [found[n] for n in found if n.rsplit("-", 1)[0] == source]
        means = {
            d: statistics.mean(statistics.mean(rises(x, dense, d)) for x in draws) for d in domains
        }
        worst = max(means, key=means.__getitem__)
        content["worst"].append(
            {"source": source, "domain": worst, "rise": means[worst]} | {"all": means}
        )
        print(f"worst domain of {source}: {worst}, loss + {means[worst]:.3f} nats")
    if "minimax" in sources:
        for other in [s for s in sources if s not in ("minimax", "random", "ellipsis")]:
            count = min(sum(n.startswith(f"{s}-") for n in found) for s in ("minimax", other))
            for d in domains:
                one, two = (
                    np.array([rises(found[f"{s}-{i}"], dense, d) for i in range(count)])
                    for s in ("minimax", other)
                )
                if count > 1:
                    delta = two_level_bootstrap(one, two)
                    content.setdefault("minimax_minus", {})[f"{other}, {d}"] = vars(delta)
    if given.plot and points:
        plot_proxy(points, given.plot, within=True)
    if given.json:
        given.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
