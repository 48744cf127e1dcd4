"""Ridges chosen by held-out error, the guard of gptq_heldout, other grids, corrected targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress, engine
from lm_calib_plugin.engine.solve import Solver
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.rounding.gptq import DAMPS
from lm_calib_plugin.statistics import GramRanges
from tests.engine.test_walk import QUIET, calibration, flat
from tests.methods import method_of
from tests.quantization.test_gptq import gram_of, problem
from tests.tiny import make_model, random_ids

Array = np.ndarray
GRIDS: list[dict[str, Any]] = [
    {"bits": 3, "group_size": 8},
    {"bits": 4, "group_size": -1, "symmetric": False},
    {"bits": 4, "group_size": 8, "grid": "mse"},
    {"scheme": "FP8"},
]


def tensors(seed: int, few: int = 30) -> tuple[torch.Tensor, Any, Array]:
    """Return a weight, statistics of few tokens with many others held out, and the latter."""
    weight, rows = problem(8, 48, seed, count=few + 300)
    x, other = rows[:few], rows[few:]
    stats = gram_of(x)
    stats.heldout = gram_of(other)
    return torch.from_numpy(weight).float(), stats, other


def error(weight: torch.Tensor, found: torch.Tensor, x: Array) -> float:
    change = found.double().numpy() - weight.double().numpy()
    return float(np.sum((x @ change.T) ** 2))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_ridge_is_that_of_the_smallest_error_held_out(seed: int, grid: dict) -> None:
    weight, stats, other = tensors(seed)
    single = [method_of("gptq", damp=d, **grid).compress(weight, stats) for d in DAMPS]
    errors = [error(weight, one.weight, other) for one in single]
    found = method_of("gptq", damp="auto", **grid).compress(weight, stats)
    best = single[int(np.argmin(errors))]
    assert torch.equal(found.weight, best.weight)
    assert found.damp == best.damp
    assert len({round(e, 6) for e in errors}) > 1


@pytest.mark.parametrize("damp", [0.01, "auto"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_guard_keeps_the_better_of_both(grid: dict, damp: Any) -> None:
    fell = 0
    # With very few tokens GPTQ fits them, and only them.
    for seed, few in [(s, f) for s in range(4) for f in (3, 12, 300)]:
        weight, stats, other = tensors(seed, few)
        swept = method_of("gptq", damp=damp, **grid).compress(weight, stats).weight
        nearest = method_of("rtn", **grid).compress(weight, None).weight
        found = method_of("gptq_heldout", damp=damp, **grid).compress(weight, stats)
        errors = error(weight, swept, other), error(weight, nearest, other)
        assert torch.equal(found.weight, swept if errors[0] <= errors[1] else nearest)
        assert error(weight, found.weight, other) <= errors[1]
        assert (found.fallback == "rtn") == (errors[1] < errors[0])
        assert (found.damp is None) == (found.fallback is not None)
        assert found.grid.holds(found.weight)
        fell += found.fallback is not None
    assert fell < 12
    if damp != "auto":
        assert fell > 0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("act_order", [True, False])
def test_uncorrelated_inputs_round_to_nearest_on_every_grid(grid: dict, act_order: bool) -> None:
    weight, _ = problem(6, 48, 1)
    tensor = torch.from_numpy(weight).float()
    stats = gram_of(np.diag(np.logspace(-1, 1, 48)))
    found = method_of("gptq", act_order=act_order, **grid).compress(tensor, stats)
    plain = method_of("rtn", **grid).compress(tensor, None)
    assert torch.equal(found.weight, plain.weight)
    assert torch.equal(found.grid.scale, plain.grid.scale)


@pytest.mark.parametrize("damp", [0.01, 0.1])
def test_equal_inputs_share_their_weights(damp: float) -> None:
    """Channels that are always equal: each error goes, in equal parts, to those that are left.

    With ``G = a (1 1^T + d I)`` the best completion hands ``e / (k + d)`` to each of ``k`` later
    columns.
    """
    width, rows = 12, 5
    weight, _ = problem(rows, width, 7)
    x = np.repeat(np.random.default_rng(0).standard_normal((40, 1)), width, axis=1)
    x = x.astype(np.float32).astype(float)
    tensor = torch.from_numpy(weight).float()
    options = {"bits": 3, "group_size": -1, "symmetric": False, "act_order": False}
    result = method_of("gptq", damp=damp, **options).compress(tensor, gram_of(x))
    grid, current = result.grid, weight.copy()
    scale, zero = grid.scale.double().numpy()[:, 0], grid.zero.double().numpy()[:, 0]
    for j in range(width):
        level = np.clip(np.round(current[:, j] / scale) + zero, 0, 7)
        rounded = (level - zero) * scale
        np.testing.assert_allclose(result.weight[:, j].numpy(), rounded, rtol=1e-4, atol=1e-5)
        left = width - j - 1
        current[:, j + 1 :] += ((current[:, j] - rounded) / (left + damp))[:, None]
    # The sum is what counts; it is off by less than a step in the end.
    assert (np.abs((result.weight.double().numpy() - weight).sum(1)) < scale * (1 + damp)).all()


# --- through a model --------------------------------------------------------------------------


def test_each_layer_of_a_model_takes_the_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer: equal to one of both, never worse on what is held out, and reported."""
    seen: dict[str, tuple[torch.Tensor, Any]] = {}
    solve = Solver._compressed

    def spy(self: Any, method: Any, layers: Any, weights: Any, stats: Any) -> Any:
        for layer, weight in zip(layers, weights, strict=True):
            seen[layer.name] = weight.clone(), stats
        return solve(self, method, layers, weights, stats)

    monkeypatch.setattr(Solver, "_compressed", spy)
    ids = random_ids([16] * 8)
    model = make_model()
    recipe = Recipe(method="gptq_heldout", bits=3, group_size=8, heldout=0.5)
    report = compress(model, None, recipe, QUIET, CalibrationSet.of(ids, seqlen=16))
    rows = {row.name: row for row in report.layers}
    grid = {"bits": 3, "group_size": 8}
    fell = 0
    for name, (weight, stats) in seen.items():
        swept = method_of("gptq", **grid).compress(weight, stats).weight
        nearest = method_of("rtn", **grid).compress(weight, None).weight
        judge = stats.heldout.gram().double()

        def out(found: torch.Tensor, w: Any = weight, g: Any = judge) -> float:
            change = (found - w).double()
            return float(((change @ g) * change).sum())

        stored = model.get_submodule(name).weight.data
        wanted = swept if out(swept) <= out(nearest) else nearest
        assert torch.equal(stored, wanted)
        assert out(stored) <= out(nearest)
        assert rows[name].fallback == (None if wanted is swept else "rtn")
        fell += wanted is nearest
    told = [w for w in report.warnings if "fell back to rtn" in w]
    assert len(told) == bool(fell)
    if fell:
        assert f"{fell} of 21" in told[0]


def test_ridges_of_a_model_are_reported() -> None:
    recipe = Recipe(method="gptq", bits=3, group_size=8, damp="auto", heldout=0.3)
    report = compress(make_model(), None, recipe, QUIET, calibration())
    assert {row.damp for row in report.layers} <= set(DAMPS)
    assert not any("damp raised" in w for w in report.warnings)


def test_without_sequences_held_out_nothing_is_chosen() -> None:
    with pytest.raises(UserError, match="heldout: got 0"):
        Recipe(method="gptq", damp="auto", heldout=0)
    with pytest.raises(UserError, match="heldout: got 0"):
        Recipe(method="gptq_heldout", heldout=0)
    weight, stats, _ = tensors(0)
    stats.heldout = None
    for options in ({"damp": "auto"}, {}):
        name = "gptq" if options else "gptq_heldout"
        with pytest.raises(UserError, match="held out"):
            method_of(name, bits=3, group_size=8, **options).compress(weight, stats)


@pytest.mark.parametrize("options", [{"correction": 0.6}, {"correction": 0.0}], ids=str)
def test_a_corrected_target_is_what_is_rounded(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights stored are those of the plain method for the target and statistics given."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor, Any]] = {}
    solve = Solver._compressed

    def spy(self: Any, method: Any, layers: Any, targets: Any, stats: Any) -> Any:
        for layer, target in zip(layers, targets, strict=True):
            seen[layer.name] = layer.read(), target.clone(), stats
        return solve(self, method, layers, targets, stats)

    monkeypatch.setattr(Solver, "_compressed", spy)
    model = make_model()
    recipe = Recipe(method="gptq", bits=4, group_size=8, **options)
    compress(model, None, recipe, QUIET, calibration())
    plain = method_of("gptq", bits=4, group_size=8)
    for name, (dense, target, stats) in seen.items():
        assert torch.equal(model.get_submodule(name).weight, plain.compress(target, stats).weight)
        moved = not torch.equal(dense, target)
        # Before the first block there is nothing to make up for.
        assert moved == (bool(options["correction"]) and ".layers.0." not in name)


def test_statistics_for_ranges_serve_the_sweep_as_well() -> None:
    weight, x = problem(4, 48, 5)
    tensor, both = torch.from_numpy(weight).float(), GramRanges.empty(48)
    both.update(torch.from_numpy(x))
    plain = method_of("gptq", bits=4, group_size=8)
    assert torch.equal(
        plain.compress(tensor, both).weight, plain.compress(tensor, gram_of(x)).weight
    )


def test_one_sequence_after_the_other_gives_the_same_ridges() -> None:
    found = []
    for size in (1, 4, 10):
        model = make_model()
        recipe = Recipe(method="gptq", bits=4, group_size=8, damp="auto", propagate="dense")
        runtime = Runtime(progress=False, calib_batch_size=size)
        report = compress(model, None, recipe, runtime, calibration())
        found.append((flat(model), [row.damp for row in report.layers]))
    assert len(engine.heldout_indices(10, 0.1)) == 1
    for weights, ridges in found[1:]:
        assert sum(a != b for a, b in zip(ridges, found[0][1], strict=True)) <= 1
        assert torch.isclose(weights, found[0][0], rtol=1e-3, atol=1e-5).float().mean() > 0.99
