"""AutoRound against steps written out by hand, and against all ways to round on tiny layers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.grids import GridSpec, IntegerGrid
from lm_calib_plugin.quantization.parts import Setting
from lm_calib_plugin.quantization.rounding.autoround import AutoRound


class TwoLayers:
    """``tanh(x A^T) B^T`` for every sequence ``x``, compared with its dense output."""

    def __init__(
        self, sequences: int = 6, heldout: int = 0, out: int = 4, width: int = 8, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.weights: dict[str, Tensor] = {"a": draw(8, width), "b": draw(out, 8)}
        mix = draw(width, width)
        self.inputs = [draw(5, width) @ mix for _ in range(sequences + heldout)]
        self.sequences, self.heldout = sequences, heldout
        self.asked: list[list[int]] = []
        self.seen: list[dict[str, Tensor]] = []

    def output(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ weights["a"].t()) @ weights["b"].t()

    def loss(
        self, weights: Mapping[str, Tensor], sequences: Sequence[int], heldout: bool = False
    ) -> Tensor:
        if torch.is_grad_enabled():
            self.asked.append(list(sequences))
            self.seen.append({k: v.detach().clone() for k, v in weights.items()})
        start = self.sequences if heldout else 0
        x = torch.cat([self.inputs[start + i] for i in sequences])
        return (self.output(weights, x) - self.output(self.weights, x)).square().mean()


class OneLayer(TwoLayers):
    """``x A^T``: the error of a row is a quadratic form."""

    def __init__(self, rows: int = 2, width: int = 6, seed: int = 0) -> None:
        super().__init__(4, 0, rows, width, seed)
        self.weights = {"a": self.weights["a"][:rows]}

    def output(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return x @ weights["a"].t()


def grids_of(
    problem: TwoLayers,
    bits: int = 2,
    size: int = 4,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, IntegerGrid]:
    return {
        name: IntegerGrid.fit(w, bits, size, symmetric, dtype)
        for name, w in problem.weights.items()
    }


def solved(problem: TwoLayers, method: AutoRound, **grid: object) -> dict[str, Tensor]:
    results = method.round_block(problem, grids_of(problem, **grid), progress=False)
    return {name: result.weight for name, result in results.items()}


def error(problem: TwoLayers, weights: Mapping[str, Tensor], heldout: bool = False) -> float:
    with torch.no_grad():
        count = problem.heldout if heldout else problem.sequences
        return float(problem.loss(weights, range(count), heldout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_better_than_nearest_and_on_the_grid(
    bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    problem = TwoLayers(heldout=2)
    grids = grids_of(problem, bits, 4, symmetric, dtype)
    before = {k: v.clone() for k, v in problem.weights.items()}
    results = AutoRound(iters=60).round_block(problem, grids, progress=False)
    nearest = {name: grid.round(problem.weights[name]) for name, grid in grids.items()}
    found = {name: result.weight for name, result in results.items()}
    assert error(problem, found) <= error(problem, nearest)
    if bits < 8:
        assert error(problem, found) < 0.9 * error(problem, nearest)
    for name, result in results.items():
        grid = result.grid
        assert type(grid) is IntegerGrid
        assert grid.holds(result.weight.to(dtype))
        assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
        assert torch.equal(grid.zero, grid.zero.round())
        assert grid.zero.min() >= 0
        # The range is never wider than that of the grid rule, and at least half of it.
        ratio = grid.scale / grids[name].scale
        assert ratio.max() <= 1.01
        assert ratio.min() >= 0.49
        assert torch.equal(problem.weights[name], before[name])
        assert not result.weight.requires_grad
        assert bits == 8 or result.fallback is None


def numpy_steps(w: np.ndarray, x: np.ndarray, grid: IntegerGrid, iters: int) -> list[np.ndarray]:
    """The rounded weights of every step on one symmetric layer, with derivatives by hand."""
    size, base = grid.group_size, grid.scale.double().numpy()
    lowest, highest = grid.lowest, grid.highest
    v, a = np.zeros_like(w), np.ones_like(base)
    found = []
    for t in range(iters):
        s = np.repeat(base * a, size, axis=1)
        free = np.round(w / s + v)
        q = np.clip(free, lowest, highest)
        found.append(q * s)
        slope = 2 * ((q * s - w) @ x.T @ x) / (x.shape[0] * w.shape[0])
        # torch passes the gradient of clamp at its ends, too.
        inside = (free >= lowest) & (free <= highest)
        dv = slope * s * inside
        ds = slope * (q + s * inside * (-w / s**2))
        da = ds.reshape(w.shape[0], -1, size).sum(axis=-1) * base
        length = 1 / iters * (1 - t / iters)
        v = np.clip(v - length * np.sign(dv), -0.5, 0.5)
        a = np.clip(a - length * np.sign(da), 0.5, 1)
    return found


@pytest.mark.parametrize("iters", [1, 3, 10])
def test_steps_are_those_of_the_definition(iters: int) -> None:
    for seed in range(3):
        problem = OneLayer(3, 8, seed)
        # A range of another size: by itself the largest weight lies in the middle of two levels.
        wide = torch.tensor(1.03)
        grids = {"a": IntegerGrid.fit(problem.weights["a"], 3, 4, shrink=wide)}
        AutoRound(iters=iters, batch=4).round_block(problem, grids, progress=False)
        x = torch.cat(problem.inputs[:4]).double().numpy()
        expected = numpy_steps(problem.weights["a"].double().numpy(), x, grids["a"], iters)
        assert len(problem.seen) == iters
        for seen, wanted in zip(problem.seen, expected, strict=True):
            np.testing.assert_allclose(seen["a"].numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_first_step_is_rounding_to_nearest() -> None:
    for symmetric in (True, False):
        problem = TwoLayers()
        grids = grids_of(problem, 3, 4, symmetric)
        AutoRound(iters=1).round_block(problem, grids, progress=False)
        for name, grid in grids.items():
            nearest = grid.round(problem.weights[name])
            torch.testing.assert_close(problem.seen[0][name], nearest)


def test_close_to_the_best_of_all_ways_to_round() -> None:
    """With the range fixed by hand, two neighboring levels for each of six weights."""
    gained = 0.0
    for seed in range(6):
        problem = OneLayer(1, 6, seed)
        grid = grids_of(problem, 3, 6)["a"]
        w, s = problem.weights["a"], float(grid.scale)
        below = torch.floor(w / s)
        choices = [
            (below + torch.tensor([c])).clamp(grid.lowest, grid.highest) * s
            for c in itertools.product([0.0, 1.0], repeat=6)
        ]
        best = min(error(problem, {"a": c}) for c in choices)
        nearest = error(problem, {"a": grid.round(w)})
        found = error(problem, solved(problem, AutoRound(batch=4), bits=3, size=6))
        # The ranges are learned, too, so that it may even be better.
        gained += (nearest - found) / (nearest - best) if best < nearest else 1.0
    assert gained / 6 > 0.6


def test_equal_seeds_give_equal_results_and_leave_global_draws_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (
        solved(TwoLayers(sequences=20), AutoRound(iters=20, batch=2, seed=s)) for s in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_each_step_draws_a_batch_without_repeats() -> None:
    problem = TwoLayers(sequences=10)
    solved(problem, AutoRound(iters=30, batch=4))
    assert all(len(set(a)) == len(a) == 4 for a in problem.asked)
    assert {i for a in problem.asked for i in a} == set(range(10))
    few = TwoLayers(sequences=2)
    solved(few, AutoRound(iters=3, batch=4))
    assert few.asked == [[0, 1]] * 3


def test_without_steps_it_rounds_to_nearest() -> None:
    problem = TwoLayers()
    found = solved(problem, AutoRound(iters=0))
    for name, grid in grids_of(problem).items():
        assert torch.equal(found[name], grid.round(problem.weights[name]))


def test_rounding_to_nearest_is_kept_where_learning_makes_it_worse() -> None:
    class Misleading(TwoLayers):
        """Learns from one sequence that has nothing to do with all the others."""

        def loss(
            self, weights: Mapping[str, Tensor], sequences: Sequence[int], heldout: bool = False
        ) -> Tensor:
            if torch.is_grad_enabled():
                # Rewards whatever is far away.
                return 1 / (1 + super().loss(weights, sequences))
            return super().loss(weights, sequences, heldout)

    problem = Misleading(heldout=2)
    grids = grids_of(problem)
    results = AutoRound(iters=10).round_block(problem, grids, progress=False)
    for name, result in results.items():
        assert torch.equal(result.weight, grids[name].round(problem.weights[name]))
        assert result.grid is grids[name]
        assert result.fallback == "rtn"
        told = result.details
        assert told["block_error_learned"] >= told["block_error_nearest"]


def test_errors_that_are_no_numbers_lead_back_to_nearest() -> None:
    class Broken(TwoLayers):
        def loss(
            self, weights: Mapping[str, Tensor], sequences: Sequence[int], heldout: bool = False
        ) -> Tensor:
            return super().loss(weights, sequences, heldout) * float("nan")

    problem = Broken()
    found = solved(problem, AutoRound(iters=3))
    for name, grid in grids_of(problem).items():
        assert torch.equal(found[name], grid.round(problem.weights[name]))


def test_every_result_tells_both_errors_of_both_roundings() -> None:
    problem = TwoLayers(heldout=3)
    grids = grids_of(problem)
    results = AutoRound(iters=20).round_block(problem, grids, progress=False)
    found = {name: result.weight for name, result in results.items()}
    nearest = {name: grid.round(problem.weights[name]) for name, grid in grids.items()}
    for result in results.values():
        assert result.details == pytest.approx(
            {
                "block_error_learned": error(problem, found),
                "block_error_learned_heldout": error(problem, found, heldout=True),
                "block_error_nearest": error(problem, nearest),
                "block_error_nearest_heldout": error(problem, nearest, heldout=True),
            }
        )


def test_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        problem = TwoLayers()
        off = solved(problem, AutoRound(iters=10))
        assert not torch.is_grad_enabled()
    on = solved(TwoLayers(), AutoRound(iters=10))
    assert all(torch.equal(off[k], on[k]) for k in on)


def test_weights_of_zero_and_a_layer_without_influence_stay_finite() -> None:
    problem = TwoLayers()
    problem.weights["b"] = torch.zeros_like(problem.weights["b"])
    for symmetric in (True, False):
        found = solved(problem, AutoRound(iters=5), symmetric=symmetric)
        assert all(w.isfinite().all() for w in found.values())
        assert (found["b"] == 0).all()


def test_a_weight_outside_the_blocks_is_rounded_to_nearest_with_a_note() -> None:
    w = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    grid = IntegerGrid.fit(w, 4, 4)
    result = AutoRound().round(w, grid, None, Setting())
    assert torch.equal(result.weight, grid.round(w))
    assert "rounded to nearest" in result.notes[0]
    assert result.fallback == "rtn"


def test_other_numbers_than_integers_are_refused() -> None:
    AutoRound().check(GridSpec("int", 2, 64, False))
    with pytest.raises(UserError, match="rounding=gptq"):
        AutoRound().check(GridSpec("fp8", 8, -1))


@pytest.mark.parametrize("options", [{"iters": "-1"}, {"batch": "0"}, {"lr": "-1"}, {"seed": "-1"}])
def test_bad_options_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        AutoRound.from_texts(options)
