"""Layers that share an input, compressed in one go and one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.joint import Joint
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.pruning import obs
from lm_calib_plugin.quantization.rounding import gptq
from lm_calib_plugin.statistics import Gram, GramSpread
from tests.methods import method_of

WIDTH = 160  # two blocks of the sweep, the second one short
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("sparsegpt", {"sparsity": 0.5}),
    ("sparsegpt", {"sparsity": 0.5, "compat": "reference"}),
    ("sparsegpt", {"pattern": "2:4"}),
    ("sparsegpt", {"sparsity": 0.6, "group": "row"}),
    ("sparsegpt", {"sparsity": 0.6, "group": "layer", "update": "pcg"}),
    ("wanda", {"sparsity": 0.5, "update": "obs"}),
    ("swap_pcg", {"sparsity": 0.6}),
    ("swap_pcg", {"pattern": "2:4"}),
    ("alps", {"sparsity": 0.7}),
    ("magnitude", {"sparsity": 0.5, "refine": "swap"}),
    ("gptq", {"bits": 3, "group_size": 32}),
    ("gptq", {"bits": 4, "group_size": 32, "symmetric": False, "act_order": False}),
    ("gptq", {"bits": 3, "group_size": -1, "damp": "auto"}),
    ("gptq", {"scheme": "FP8"}),
    ("gptq_heldout", {"bits": 3, "group_size": 32}),
    ("awq", {"bits": 4, "group_size": 32, "transform": "none"}),
    ("rtn", {"bits": 4, "group_size": 32}),
]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers() -> tuple[list[Tensor], Gram]:
    """Three weights of different height and size, and statistics with some held out."""
    weights = [normal(rows, WIDTH, seed=rows) * size for rows, size in ((24, 1), (7, 3), (11, 0.2))]
    mix = torch.eye(WIDTH) + 0.5 * normal(WIDTH, WIDTH, seed=1) / WIDTH**0.5
    stats, stats.heldout = GramSpread.empty(WIDTH), GramSpread.empty(WIDTH)
    for kept, seed in ((stats, 2), (stats.heldout, 3)):
        kept.update(normal(500, WIDTH, seed=seed) @ mix)
    return weights, stats


def alike(together: list[LayerResult], alone: list[LayerResult]) -> None:
    """Equal up to the last bits of products of matrices of other sizes."""
    for one, other in zip(together, alone, strict=True):
        size = float(other.weight.abs().max())
        torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=2e-5 * size)
        assert torch.equal(one.weight == 0, other.weight == 0)
        assert (one.damp, one.fallback, one.notes) == (other.damp, other.fallback, other.notes)


@pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
def test_together_is_one_after_the_other(name: str, options: dict[str, Any]) -> None:
    weights, stats = layers()
    before = [weight.clone() for weight in weights]
    method = method_of(name, **options)
    together = method.compress_together(weights, stats)
    alike(together, [method.compress(weight, stats) for weight in weights])
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    for result in together:
        assert result.grid is None or result.grid.holds(result.weight)


@pytest.mark.parametrize("second", ["gptq", "gptq_heldout", "rtn"])
@pytest.mark.parametrize("first", ["sparsegpt", "wanda", "swap_pcg"])
def test_pruning_with_quantization(first: str, second: str) -> None:
    weights, stats = layers()
    # The largest weight of a symmetric group lies between two levels, where last bits decide.
    other = method_of(second, bits=4, group_size=32, symmetric=False)
    both = method_of(first, sparsity=0.5), other
    method: Method = Joint(*both)
    alone = [method.compress(weight, stats) for weight in weights]
    alike(method.compress_together(weights, stats), alone)


@pytest.mark.parametrize(
    ("name", "room"), [("sparsegpt", obs), ("gptq", gptq), ("sparsegpt+rtn", obs)]
)
def test_the_gram_matrix_is_factored_once(
    name: str, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    factor = room.inverse_factor
    monkeypatch.setattr(room, "inverse_factor", lambda *a: calls.append(a) or factor(*a))
    weights, stats = layers()
    first, *rest = name.split("+")
    method = method_of(first, **({"group_size": 32} if first == "gptq" else {}))
    if rest:
        method = Joint(method, method_of(rest[0], bits=4, group_size=32))
    method.compress_together(weights, stats)
    assert len(calls) == 1
