"""GPTQ against slow float64 formulations that share nothing with the Cholesky sweep."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import lm_calib_plugin.quantization.rounding.gptq as module
from lm_calib_plugin.statistics import Gram
from tests.methods import method_of

Array = np.ndarray

GRIDS = [
    {"bits": 3, "group_size": -1},
    {"bits": 4, "group_size": 5, "symmetric": True},
    {"bits": 2, "group_size": 10, "symmetric": False},
    {"bits": 4, "group_size": -1, "symmetric": False},
]


def problem(rows: int, width: int, seed: int, count: int | None = None) -> tuple[Array, Array]:
    """Return a weight and correlated inputs, float32 values in float64."""
    rng = np.random.default_rng(seed)
    mix = np.eye(width) + 0.5 * rng.standard_normal((width, width)) / width**0.5
    x = rng.standard_normal((count or 4 * width, width)) @ mix
    x = x * np.logspace(-0.3, 0.3, width)[rng.permutation(width)]
    weight = rng.standard_normal((rows, width))
    return weight.astype(np.float32).astype(float), x.astype(np.float32).astype(float)


def gram_of(x: Array) -> Gram:
    stats = Gram.empty(x.shape[1])
    stats.update(torch.from_numpy(x))
    return stats


def quantize(weight: Array, x: Array, **options: object) -> Array:
    method = method_of("gptq", **options)  # type: ignore[arg-type]
    result = method.compress(torch.from_numpy(weight).float(), gram_of(x))
    return result.weight.double().numpy()


def error(x: Array, before: Array, after: Array) -> float:
    return float(np.sum((x @ (after - before).T) ** 2))


def level_sets(weight: Array, bits: int, group_size: int, symmetric: bool = True) -> list[list]:
    """Write out the levels of every row and column, from the definition of the grid."""
    rows, width = weight.shape
    size = width if group_size == -1 else group_size
    found: list[list] = []
    for i in range(rows):
        line = []
        for j in range(width):
            part = weight[i, j // size * size : (j // size + 1) * size]
            if symmetric:
                scale = np.abs(part).max() / (2 ** (bits - 1) - 0.5)
                line.append(np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * scale)
            else:
                low, high = min(0.0, part.min()), max(0.0, part.max())
                scale = (high - low) / (2**bits - 1)
                line.append((np.arange(2**bits) - np.round(-low / scale)) * scale)
        found.append(line)
    return found


def nearest(levels: Array, value: float) -> float:
    return float(levels[np.argmin(np.abs(levels - value))])


def damped(x: Array, damp: float) -> Array:
    gram = x.T @ x
    return gram + damp * np.diag(gram).mean() * np.eye(len(gram))


def visiting_order(x: Array, act_order: bool) -> list[int]:
    energy = (x**2).sum(axis=0)
    width = x.shape[1]
    return sorted(range(width), key=lambda j: -energy[j]) if act_order else list(range(width))


def slow_gptq(weight: Array, x: Array, order: list[int], damp: float, levels: list) -> Array:
    """Optimal brain quantization in a given order, with explicit updates of the inverse.

    After a column is fixed it is eliminated from the inverse Gram matrix by one step of Gaussian
    elimination; nothing is factored and nothing is done in blocks.
    """
    current, result = weight.copy(), np.zeros_like(weight)
    inverse = np.linalg.inv(damped(x, damp))
    for j in order:
        for i in range(weight.shape[0]):
            result[i, j] = nearest(levels[i][j], current[i, j])
            current[i] -= (current[i, j] - result[i, j]) / inverse[j, j] * inverse[j]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


def assert_same_levels(result: Array, expected: Array) -> None:
    # A level apart would be at least 1e-2 here; float32 scales differ by 1e-7.
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_slow_loop(grid: dict, act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 8)
    for seed in range(3):
        weight, x = problem(4, 20, seed)
        order = visiting_order(x, act_order)
        expected = slow_gptq(weight, x, order, 0.01, level_sets(weight, **grid))
        assert_same_levels(quantize(weight, x, act_order=act_order, **grid), expected)


@pytest.mark.parametrize("act_order", [True, False])
def test_equals_slow_loop_with_blocks_of_128(act_order: bool) -> None:
    weight, x = problem(2, 150, 11)
    levels = level_sets(weight, 4, 30)
    expected = slow_gptq(weight, x, visiting_order(x, act_order), 0.05, levels)
    result = quantize(weight, x, bits=4, group_size=30, damp=0.05, act_order=act_order)
    assert_same_levels(result, expected)


@pytest.mark.parametrize("act_order", [True, False])
def test_every_column_is_the_rounded_best_completion(act_order: bool) -> None:
    """Given the columns already fixed, the next one is least squares from scratch, rounded."""
    weight, x = problem(3, 10, 12)
    result = quantize(weight, x, bits=3, group_size=5, act_order=act_order)
    levels = level_sets(weight, 3, 5)
    ridge = np.sqrt(0.01 * np.diag(x.T @ x).mean()) * np.eye(10)
    design = np.vstack([x, ridge])
    order = visiting_order(x, act_order)
    for i in range(3):
        target = design @ weight[i]
        for place, j in enumerate(order):
            done, free = order[:place], order[place:]
            left = target - design[:, done] @ result[i, done]
            completion, *_ = np.linalg.lstsq(design[:, free], left, rcond=None)
            wanted = nearest(levels[i][j], completion[0])
            assert result[i, j] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("inputs", ["identity", "diagonal"])
def test_uncorrelated_inputs_make_it_round_to_nearest(
    grid: dict, act_order: bool, inputs: str
) -> None:
    weight, _ = problem(6, 150, 13)
    norms = np.ones(150) if inputs == "identity" else np.logspace(-1, 1, 150)[::-1]
    result = quantize(weight, np.diag(norms), act_order=act_order, **grid)
    plain = method_of("rtn", **grid).compress(torch.from_numpy(weight).float(), None)
    assert np.array_equal(result, plain.weight.double().numpy())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_error_on_calibration_tokens_is_below_round_to_nearest(grid: dict, act_order: bool) -> None:
    for seed in range(4):
        weight, x = problem(16, 40, 60 + seed)
        plain = (
            method_of("rtn", **grid)
            .compress(torch.from_numpy(weight).float(), None)
            .weight.double()
            .numpy()
        )
        result = quantize(weight, x, act_order=act_order, **grid)
        assert error(x, weight, result) < error(x, weight, plain)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_exhaustive_search_on_a_tiny_layer_bounds_the_error(seed: int, symmetric: bool) -> None:
    weight, x = problem(2, 4, 20 + seed, 16)
    levels = level_sets(weight, 2, -1, symmetric)
    result = quantize(weight, x, bits=2, group_size=-1, symmetric=symmetric, damp=0.0)
    best = 0.0
    for i in range(2):
        row = weight[i : i + 1]
        errors = [error(x, row, np.array([q])) for q in itertools.product(*levels[i])]
        reached = error(x, row, result[i : i + 1])
        assert reached >= min(errors) * (1 - 1e-4)
        assert reached <= sorted(errors)[len(errors) // 10]  # among the best tenth of 256
        best += min(errors)
    assert error(x, weight, result) >= best * (1 - 1e-4)


def test_act_order_makes_the_order_of_the_inputs_irrelevant() -> None:
    """Visiting by falling energy is the same walk however the columns are numbered."""
    weight, x = problem(6, 30, 31)
    shuffle = np.random.default_rng(32).permutation(30)
    one = quantize(weight, x, bits=3, group_size=-1)
    other = quantize(weight[:, shuffle], x[:, shuffle], bits=3, group_size=-1)
    assert_same_levels(other, one[:, shuffle])
    in_order = quantize(weight[:, shuffle], x[:, shuffle], bits=3, group_size=-1, act_order=False)
    assert not np.allclose(in_order, one[:, shuffle], atol=1e-3)


def test_act_order_helps_when_a_loud_input_comes_last() -> None:
    better = 0
    for seed in range(6):
        weight, x = problem(16, 40, 70 + seed)
        x[:, -1] *= 20.0
        with_order = quantize(weight, x, bits=3, group_size=-1, act_order=True)
        without = quantize(weight, x, bits=3, group_size=-1, act_order=False)
        better += error(x, weight, with_order) < error(x, weight, without)
    assert better >= 5


@pytest.mark.parametrize("act_order", [True, False])
def test_scales_are_those_of_the_original_weights(act_order: bool) -> None:
    weight, x = problem(4, 20, 33)
    float32 = torch.from_numpy(weight).float()
    for grid in GRIDS:
        method = method_of("gptq", act_order=act_order, **grid)
        result = method.compress(float32, gram_of(x))
        plain = method_of("rtn", **grid).compress(float32, None)
        assert torch.equal(result.grid.scale, plain.grid.scale)
        assert torch.equal(result.grid.zero, plain.grid.zero)


def test_silent_inputs_are_rounded_to_nearest_and_disturb_nobody() -> None:
    weight, x = problem(4, 20, 34)
    dead = [0, 7, 19]
    x[:, dead] = 0.0
    result = quantize(weight, x, bits=4, group_size=-1)
    levels = level_sets(weight, 4, -1)
    for i, j in itertools.product(range(4), dead):
        assert result[i, j] == pytest.approx(nearest(levels[i][j], weight[i, j]), abs=1e-6)
    live = [j for j in range(20) if j not in dead]
    order = [j for j in visiting_order(x, True) if j in live]
    # The ridge is relative to the mean energy of all inputs, the silent ones included.
    assert_same_levels(
        result[:, live],
        slow_gptq(
            weight[:, live],
            x[:, live],
            [live.index(j) for j in order],
            0.01 * len(live) / 20,
            [[levels[i][j] for j in live] for i in range(4)],
        ),
    )


def test_reference_mode_zeroes_silent_inputs_before_scales_are_set() -> None:
    weight, x = problem(4, 20, 35)
    dead = [0, 7, 19]
    x[:, dead] = 0.0
    weight[:, 7] = 50.0  # would ruin the scale
    emptied = weight.copy()
    emptied[:, dead] = 0.0
    result = quantize(weight, x, bits=4, group_size=-1, compat="reference")
    assert (result[:, dead] == 0).all()
    assert np.array_equal(result, quantize(emptied, x, bits=4, group_size=-1))


def test_ridge_that_was_used_is_reported() -> None:
    weight, x = problem(4, 20, 36)
    float32 = torch.from_numpy(weight).float()
    assert method_of("gptq", group_size=-1, damp=0.03).compress(float32, gram_of(x)).damp == 0.03
    x[:, 5] = x[:, 4] = np.round(x[:, 4])
    singular = Gram.empty(20)
    singular.update(torch.from_numpy(x[:1]))
    result = method_of("gptq", group_size=-1, damp=0.0).compress(float32, singular)
    assert result.damp is not None
    assert result.damp > 0
