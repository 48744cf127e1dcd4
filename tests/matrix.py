"""One row per method and set of options; the row buys all contract tests.

The claims stand here a second time on purpose: they are what the documentation promises, and the
contract tests hold the classes to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lm_calib_plugin import registry


@dataclass(frozen=True)
class Row:
    """A method with options, and what is claimed of it.

    ``group`` is the comparison group inside which the count of zeros is exact: ``layer``, ``row``,
    ``block`` (all rows of 128 columns), ``n:m``, ``at least`` (threshold rule: the count or more)
    or ``levels`` for quantization. ``budget`` is the fraction removed, or ``(N, M)`` kept.
    ``stats_scale``: the result does not depend on the scale of the statistic. ``weight_scale``:
    scaling the weights scales the result. ``keeps_values``: weights that stay are not changed.
    ``by_score``: with uncorrelated inputs, what goes are the smallest products of weight and input
    norm. ``zero`` are options that turn the method into nothing.
    """

    name: str
    options: Mapping[str, Any]
    statistic: str
    group: str
    budget: Any = None
    permutation_safe: bool = False
    stats_scale: bool = True
    weight_scale: bool = True
    keeps_values: bool = False
    by_score: bool = True
    zero: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        given = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.name}[{given}]"

    @property
    def prunes(self) -> bool:
        return self.group != "levels"


def _pruning(
    name: str,
    statistic: str,
    group: str,
    permutation_safe: bool,
    keeps_values: bool,
    reference: str = "at least",
    **claims: bool,
) -> list[Row]:
    def row(options: dict[str, Any], kind: str, budget: Any, safe: bool) -> Row:
        return Row(
            name,
            options,
            statistic,
            kind,
            budget,
            permutation_safe=safe,
            keeps_values=keeps_values,
            zero={"sparsity": 0.0},
            **claims,
        )

    rows = [row({"sparsity": s}, group, s, permutation_safe) for s in (0.5, 0.29, 0.99)]
    # Groups of one row are compared: what a score says of a row alone is all that counts.
    alone = permutation_safe or name == "magnitude"
    rows += [
        row({"pattern": f"{n}:{m}"}, "n:m", (n, m), alone)
        for n, m in ((2, 4), (1, 4), (3, 5), (4, 8))
    ]
    reference = "row" if group == "row" else reference
    rows.append(row({"sparsity": 0.5, "compat": "reference"}, reference, 0.5, permutation_safe))
    return rows


_NO_SCHEME = {"scheme": None, "bits": 16}
_STAGES = {name: dict(entry.stages) for name, entry in registry.table("quantization").items()}


def _quantization(
    name: str, statistic: str, extra: list[dict[str, Any]], permutation_safe: bool = True
) -> list[Row]:
    variants: list[dict[str, Any]] = [
        {"bits": 4, "group_size": -1},
        {"bits": 2, "group_size": 8},
        {"bits": 3, "group_size": 20, "symmetric": False},
        {"bits": 4, "group_size": 40, "symmetric": True},
        {"bits": 8, "group_size": -1, "symmetric": False},
        *extra,
    ]
    return [
        Row(
            name,
            options,
            statistic,
            "levels",
            permutation_safe=permutation_safe,
            zero={"bits": 16} | ({"transform": "none"} if "transform" in _STAGES[name] else {}),
        )
        for options in variants
    ]


ROWS: list[Row] = [
    *_pruning("magnitude", "none", "layer", permutation_safe=False, keeps_values=True),
    *_pruning("wanda", "moments", "row", permutation_safe=True, keeps_values=True),
    # Its scores share row and column.
    *_pruning("ria", "moments", "layer", permutation_safe=False, keeps_values=True, by_score=False),
    *_pruning("sparsegpt", "gram", "block", permutation_safe=False, keeps_values=False),
    *_pruning("admm", "gram", "layer", False, False, reference="layer", by_score=False),
    *_pruning("alps", "gram", "layer", False, False, reference="layer", by_score=False),
    *_pruning("swap_pcg", "gram", "row", False, False, by_score=False),
    Row(
        "swap_pcg",
        {
            "sparsity": 0.6,
            "correction": 0.5,
            "score": "wanda",
            "refine": "swap?steps=20",
            "update": "pcg?steps=5",
        },
        "gram",
        "row",
        0.6,
        by_score=False,
        zero={"sparsity": 0.0},
    ),
    # Its threshold is a number in the units of the output.
    *_pruning(
        "dsnot", "spread", "row", True, True, by_score=False, stats_scale=False, weight_scale=False
    ),
    Row(
        "dsnot",
        {"sparsity": 0.5, "refine": "dsnot?threshold=0"},
        "spread",
        "row",
        0.5,
        permutation_safe=True,
        keeps_values=True,
        by_score=False,
        zero={"sparsity": 0.0},
    ),
    # Without other layers an allocation changes nothing.
    *_pruning("owl", "moments", "row", permutation_safe=True, keeps_values=True),
    *_pruning("owl_sparsegpt", "gram", "block", permutation_safe=False, keeps_values=False),
    Row(
        "sparsegpt",
        {"sparsity": 0.6, "damp": 0.1},
        "gram",
        "block",
        0.6,
        zero={"sparsity": 0.0},
    ),
    *_quantization("rtn", "none", [{"bits": 4, "group_size": -1, "grid": "mse?steps=10"}]),
    Row("rtn", {"scheme": "FP8"}, "none", "levels", permutation_safe=True, zero=_NO_SCHEME),
    *_quantization(
        "gptq",
        "gram",
        [
            {"bits": 4, "group_size": 8, "act_order": False},
            {"bits": 3, "group_size": -1, "act_order": False, "symmetric": False},
            {"bits": 4, "group_size": 20, "damp": 0.1, "compat": "reference"},
            {"bits": 3, "group_size": 8, "grid": "clip"},
        ],
    ),
    Row("gptq", {"scheme": "FP8"}, "gram", "levels", permutation_safe=True, zero=_NO_SCHEME),
    *_quantization("gptq_heldout", "gram", []),
    *_quantization("awq", "gram+ranges", [], permutation_safe=False),
    *_quantization("smoothquant", "ranges", [], permutation_safe=False),
    *_quantization("rotation", "gram", [], permutation_safe=False),
    *_quantization("autoround", "none", [], permutation_safe=False),
    Row(
        "hqq",
        {"bits": 4, "group_size": 8, "symmetric": False},
        "none",
        "levels",
        permutation_safe=True,
        weight_scale=False,
        zero={"bits": 16},
    ),
    Row(
        "hqq",
        {"bits": 2, "group_size": -1, "symmetric": False},
        "none",
        "levels",
        permutation_safe=True,
        weight_scale=False,
        zero={"bits": 16},
    ),
]
