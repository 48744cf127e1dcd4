"""Pruning and quantization of one weight, against masks and column loops in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lm_calib_plugin import Recipe, compress
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.statistics import Gram
from tests.engine.test_walk import QUIET, calibration, flat
from tests.methods import method_of
from tests.quantization.test_gptq import (
    damped,
    gram_of,
    level_sets,
    nearest,
    problem,
    visiting_order,
)
from tests.tiny import make_model

Array = np.ndarray


def result(name: str, weight: Array, x: Array, **options: Any) -> Array:
    found = method_of(name, **options).compress(torch.from_numpy(weight).float(), gram_of(x))
    return found.weight.double().numpy()


def slow_sweep(
    weight: Array, keep: Array, x: Array, order: list[int], damp: float, levels: list | None
) -> Array:
    """Go over the columns: what is removed becomes zero, what stays the nearest level.

    The error of each column is handed to all later ones by the inverse Gram matrix, from which the
    column is then eliminated.
    """
    current, found = weight.copy(), np.zeros_like(weight)
    inverse = np.linalg.inv(damped(x, damp))
    for j in order:
        for i in range(len(weight)):
            if keep[i, j]:
                value = current[i, j]
                found[i, j] = value if levels is None else nearest(levels[i][j], value)
            current[i] -= (current[i, j] - found[i, j]) / inverse[j, j] * inverse[j]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return found


def levels_of(pruned: Array) -> list:
    """Return the levels of every group; where all of it is removed, any will do."""
    filled = pruned.copy()
    filled.reshape(-1, 5)[(pruned.reshape(-1, 5) == 0).all(1)] = 1.0
    return level_sets(filled, 4, 5, False)


QUANTIZED = {"bits": 4, "group_size": 5, "symmetric": False}


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("pruning", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("seed", range(2))
def test_one_sweep_equals_a_column_loop(seed: int, pruning: str, act_order: bool) -> None:
    weight, x = problem(4, 20, seed)
    pruned = result(pruning, weight, x, sparsity=0.5)
    levels = levels_of(pruned)
    expected = slow_sweep(weight, pruned != 0, x, visiting_order(x, act_order), 0.01, levels)
    options = QUANTIZED | {"sparsity": 0.5, "act_order": act_order}
    found = result(f"{pruning}+gptq", weight, x, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (found[pruned == 0] == 0).all()


def test_n_of_m_in_one_sweep() -> None:
    weight, x = problem(4, 20, 9)
    pruned = result("sparsegpt", weight, x, pattern="2:4")
    levels = levels_of(pruned)
    expected = slow_sweep(weight, pruned != 0, x, visiting_order(x, True), 0.01, levels)
    found = result("sparsegpt+gptq", weight, x, pattern="2:4", **QUANTIZED)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert ((found.reshape(4, 5, 4) != 0).sum(-1) <= 2).all()


@pytest.mark.parametrize("pruning", ["wanda", "sparsegpt", "swap_pcg", "admm", "magnitude"])
def test_rounding_to_nearest_rounds_the_pruned_weight(pruning: str) -> None:
    """New values that pruning has found are what is rounded, those of a sweep as well."""
    weight, x = problem(6, 40, 3)
    pruned = result(pruning, weight, x, sparsity=0.5)
    found = result(f"{pruning}+rtn", weight, x, sparsity=0.5, bits=4, group_size=8)
    plain = result("rtn", pruned, x, bits=4, group_size=8)
    assert np.array_equal(found, plain)
    updates = pruning not in ("wanda", "magnitude")
    assert np.array_equal(
        found, result("rtn", weight * (pruned != 0), x, bits=4, group_size=8)
    ) != (updates)


def test_a_fine_grid_leaves_pruning_alone() -> None:
    """Towards many levels, the joint sweep is the update of SparseGPT over the same mask."""
    weight, x = problem(6, 40, 4)
    alone = result("wanda", weight, x, sparsity=0.5, update="obs")
    found = {}
    for bits in (3, 5, 8):
        options = {"bits": bits, "group_size": 4, "symmetric": False, "act_order": False}
        joint = result("wanda+gptq", weight, x, sparsity=0.5, update="obs", **options)
        assert ((joint == 0) >= (alone == 0)).all()
        found[bits] = np.abs(joint - alone).max()
    assert found[8] < 0.2 * found[3]
    assert found[8] < found[5] < found[3]


@pytest.mark.parametrize("rounding", ["gptq", "rtn", "gptq_heldout"])
def test_the_better_of_two_by_sequences_held_out(rounding: str) -> None:
    """A joint guard compares both on the mask; the zeros stay in either case."""
    weight, x = problem(6, 24, 5, count=12)
    _, other = problem(6, 24, 50, count=200)
    stats = gram_of(x)
    stats.heldout = gram_of(other)
    tensor = torch.from_numpy(weight).float()
    options = {"sparsity": 0.5, "bits": 3, "group_size": 8, "damp": 0.01}
    mask = method_of("wanda", sparsity=0.5).compress(tensor, stats).weight != 0
    found = method_of(f"wanda+{rounding}", **options).compress(tensor, stats)
    assert not found.weight[~mask].any()
    if rounding != "gptq_heldout":
        return
    errors = {}
    for name in ("gptq", "rtn", "gptq_heldout"):
        one = method_of(f"wanda+{name}", **options).compress(tensor, stats).weight
        change = one.double().numpy() - weight
        errors[name] = np.sum((other @ change.T) ** 2)
    assert errors["gptq_heldout"] == min(errors["gptq"], errors["rtn"])
    assert (found.fallback == "rtn") == (errors["rtn"] < errors["gptq"])


@pytest.mark.parametrize("pruning", ["wanda", "sparsegpt", "magnitude", "swap_pcg"])
@pytest.mark.parametrize("quantization", ["rtn", "gptq"])
def test_nothing_of_one_is_the_other_alone(pruning: str, quantization: str) -> None:
    grid = {"bits": 4, "group_size": 8}

    def run(**options: Any) -> tuple[Tensor, Any]:
        model = make_model()
        report = compress(model, None, Recipe(**options), QUIET, calibration())
        return flat(model), report

    own = {"correction": 0} if pruning == "swap_pcg" else {}
    both = {"method": f"{pruning}+{quantization}", **own}
    assert torch.equal(run(**both, sparsity=0, **grid)[0], run(method=quantization, **grid)[0])
    assert torch.equal(
        run(**both, sparsity=0.5, bits=16)[0], run(method=pruning, sparsity=0.5, **own)[0]
    )
    nothing, report = run(**both, sparsity=0, bits=16)
    assert torch.equal(nothing, flat(make_model()))
    assert report.achieved["sparsity"] == 0


def linear(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}


METHODS = [
    {"method": "wanda+rtn", "sparsity": 0.5},
    {"method": "wanda+gptq", "sparsity": 0.6, "damp": "auto"},
    {"method": "sparsegpt+gptq", "sparsity": 0.5, "symmetric": False},
    {"method": "sparsegpt+gptq", "sparsity": 0.5, "correction": 0.5, "true_sequential": True},
    {"method": "swap_pcg+gptq_heldout", "sparsity": 0.5},
    {"method": "wanda+awq", "sparsity": 0.5, "grid": "clip"},
    {"method": "wanda+smoothquant", "sparsity": 0.5, "group_size": -1},
    {"method": "owl+gptq", "sparsity": 0.5},
    {"method": "owl+rtn", "sparsity": 0.5},
    {"method": "sparsegpt+gptq", "sparsity": 0.5, "scheme": "FP8", "group_size": -1},
]


@pytest.mark.parametrize("options", METHODS, ids=lambda o: "-".join(map(str, o.values())))
def test_through_a_model(options: dict[str, Any]) -> None:
    """Zeros are at least those asked for, levels hold, a second run gives the same bits."""
    recipe = Recipe(**{"group_size": 8, **options})
    models = [make_model() for _ in range(2)]
    reports = [compress(m, None, recipe, QUIET, calibration()) for m in models]
    assert reports[0].weights_digest == reports[1].weights_digest
    assert reports[0].key == reports[1].key
    assert not any("damp raised" in w for w in reports[0].warnings)
    layers = linear(models[0])
    zeros = {name: float((m.weight == 0).float().mean()) for name, m in layers.items()}
    sizes = {name: m.weight.numel() for name, m in layers.items()}
    total = sum(zeros[n] * sizes[n] for n in layers) / sum(sizes.values())
    assert reports[0].achieved["sparsity"] == pytest.approx(total)
    assert total >= options["sparsity"] - 1 / 32
    if options["method"].startswith("owl"):
        assert max(zeros.values()) - min(zeros.values()) > 0.01
    else:
        # Rows and blocks of 128 columns have whole numbers.
        assert min(zeros.values()) >= options["sparsity"] - 1 / 32
    bits = reports[0].achieved["bits"]
    if bits == 4 and options.get("group_size") != -1:
        for module in layers.values():
            groups = module.weight.detach().reshape(-1, 8)
            assert max(len(g.unique()) for g in groups[:200]) <= 16


@pytest.mark.parametrize("method", ["wanda+rtn", "sparsegpt+gptq", "wanda+awq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_n_of_m_is_kept(method: str, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    recipe = Recipe(method=method, pattern="2:4", bits=4, group_size=8)
    report = compress(model, None, recipe, QUIET, calibration())
    assert report.achieved["sparsity"] >= 0.5
    for module in linear(model).values():
        assert int((module.weight.detach().reshape(-1, 4) != 0).sum(-1).max()) <= 2


def test_through_a_model_nearest_is_that_of_the_pruned_model() -> None:
    """With dense inputs the blocks do not see each other: prune, then round what came out."""
    options = {"sparsity": 0.5, "propagate": "dense"}
    grid = {"bits": 4, "group_size": 8}
    for pruning in ("wanda", "sparsegpt"):
        joint, apart = make_model(), make_model()
        compress(
            joint, None, Recipe(method=f"{pruning}+rtn", **options, **grid), QUIET, calibration()
        )
        compress(apart, None, Recipe(method=pruning, **options), QUIET, calibration())
        compress(apart, None, Recipe(method="rtn", **grid), QUIET)
        assert torch.equal(flat(joint), flat(apart))


def test_layers_named_with_16_bits_are_pruned_only() -> None:
    joint, pruned = make_model(), make_model()
    recipe = Recipe(
        method="wanda+rtn",
        sparsity=0.5,
        propagate="dense",
        bits=4,
        group_size=8,
        overrides={"*q_proj": {"bits": 16}},
    )
    report = compress(joint, None, recipe, QUIET, calibration())
    alone = Recipe(method="wanda", sparsity=0.5, propagate="dense")
    compress(pruned, None, alone, QUIET, calibration())
    rows = {row.name: row for row in report.layers}
    for name, module in linear(joint).items():
        same = torch.equal(module.weight, pruned.get_submodule(name).weight)
        assert same == name.endswith("q_proj")
        assert rows[name].bits == (None if same else 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "wanda+autoround", "sparsity": 0.5}, "autoround.*zero"),
        ({"method": "wanda+hqq", "sparsity": 0.5, "symmetric": False}, "hqq.*zero"),
        ({"method": "dsnot+awq", "sparsity": 0.5}, "spread of the inputs.*ranges"),
        ({"method": "wanda+rtn", "sparsity": 0.5, "bits": "auto:4"}, "bits: got auto:4"),
        ({"method": "sparsegpt", "sparsity": 0.5, "damp": "auto"}, "damp: got auto"),
        ({"method": "gptq+wanda", "sparsity": 0.5}, "PRUNING[+]QUANTIZATION"),
        (
            {"method": "wanda+gptq_heldout", "sparsity": 0.5, "heldout": 0.05, "group_size": 8},
            "less than one",
        ),
    ],
    ids=lambda x: x["method"] if isinstance(x, dict) else "",
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], match: str) -> None:
    model = make_model()
    with pytest.raises(UserError, match=match):
        compress(model, None, Recipe(**options), QUIET, calibration())
    assert torch.equal(flat(model), flat(make_model()))


def test_an_unseen_input_is_the_identity() -> None:
    weight, _ = problem(4, 20, 1)
    tensor = torch.from_numpy(weight).float()
    stats = Gram.empty(20)
    joint = method_of("sparsegpt+gptq", sparsity=0.5, bits=4, group_size=5).compress(tensor, stats)
    plain = method_of("sparsegpt+rtn", sparsity=0.5, bits=4, group_size=5).compress(tensor, stats)
    assert torch.equal(joint.weight, plain.weight)
