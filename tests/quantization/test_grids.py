"""The integer grid against its definition: every level written out, the nearest one taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.grids import IntegerGrid
from tests.methods import method_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def levels(grid: IntegerGrid, row: int, group: int) -> np.ndarray:
    """Every value that a weight of this row and group may take, in float64."""
    scale, zero = float(grid.scale[row, group]), float(grid.zero[row, group])
    lowest = -(2 ** (grid.bits - 1)) if grid.symmetric else 0
    return (np.arange(lowest, lowest + 2**grid.bits) - zero) * scale


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_scale_is_that_of_the_compressed_tensors_format(bits: int) -> None:
    weight = weights(3, 16)
    grid = IntegerGrid.fit(weight, bits, 8)
    for row in range(3):
        for group in range(2):
            largest = float(weight[row, 8 * group : 8 * group + 8].abs().max())
            expected = largest / (2 ** (bits - 1) - 0.5)
            assert float(grid.scale[row, group]) == pytest.approx(expected, rel=1e-6)
    assert (grid.zero == 0).all()
    assert grid.scale.shape == grid.zero.shape == (3, 2)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shift", [-5.0, 0.0, 0.7, 5.0])
def test_asymmetric_range_holds_the_weights_and_zero(bits: int, shift: float) -> None:
    weight = weights(4, 12) + shift
    grid = IntegerGrid.fit(weight, bits, symmetric=False)
    for row in range(4):
        lowest = min(0.0, float(weight[row].min()))
        highest = max(0.0, float(weight[row].max()))
        step = (highest - lowest) / (2**bits - 1)
        assert float(grid.scale[row, 0]) == pytest.approx(step, rel=1e-6)
        values = levels(grid, row, 0)
        # The zero point is rounded, which moves both ends by half a step at most.
        assert abs(values[0] - lowest) <= step / 2 * (1 + 1e-5)
        assert abs(values[-1] - highest) <= step / 2 * (1 + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_is_to_the_nearest_of_all_levels(
    bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = weights(3, 48, bits)
    grid = IntegerGrid.fit(weight, bits, 16, symmetric, dtype)
    rounded = grid.round(weight)
    for row in range(3):
        for column in range(48):
            values = levels(grid, row, column // 16)
            distance = np.abs(values - float(weight[row, column]))
            reached = abs(float(rounded[row, column]) - float(weight[row, column]))
            assert reached <= distance.min() * (1 + 1e-5) + 1e-7
            assert np.abs(values - float(rounded[row, column])).min() <= 1e-6


@given(
    st.lists(st.floats(-1000, 1000, width=32), min_size=8, max_size=8),
    st.integers(2, 8),
    st.booleans(),
)
def test_no_more_levels_than_the_bits_allow_and_zero_is_one(
    line: list[float], bits: int, symmetric: bool
) -> None:
    weight = torch.tensor([line])
    grid = IntegerGrid.fit(weight, bits, symmetric=symmetric)
    many = torch.linspace(2 * min(line) - 1, 2 * max(line) + 1, 5000)[None]
    wide = IntegerGrid(bits, 5000, symmetric, grid.scale, grid.zero, torch.float32)
    assert len(wide.round(many).unique()) <= 2**bits
    assert (grid.round(torch.zeros(1, 8)) == 0).all()
    rounded = grid.round(weight)
    assert rounded.isfinite().all()
    assert grid.holds(rounded)
    assert torch.equal(grid.round(rounded), rounded)  # rounding twice is rounding once


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [-1, 32])
def test_grid_holds_its_own_rounding_in_every_dtype(
    bits: int, symmetric: bool, dtype: torch.dtype, size: int
) -> None:
    for seed in range(4):
        weight = (weights(32, 256, seed) * 0.02).to(dtype).float()
        grid = IntegerGrid.fit(weight, bits, size, symmetric, dtype)
        assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
        stored = grid.round(weight).to(dtype)
        assert grid.holds(stored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_grid_notices_a_single_weight_off_its_level(
    bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = weights(8, 64)
    grid = IntegerGrid.fit(weight, bits, 16, symmetric, dtype)
    stored = grid.round(weight).to(dtype)
    for row, column in ((0, 0), (7, 63), (3, 17)):
        for step in (0.4, -0.4):
            moved = stored.clone()
            moved[row, column] += (step * grid.scale[row, column // 16]).to(dtype)
            assert not grid.holds(moved)
    assert not grid.holds(stored * 1.01)
    assert grid.holds(stored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grid_holds_levels_closer_than_the_numbers_of_the_dtype(dtype: torch.dtype) -> None:
    scale = torch.linspace(1, 2, 129)[:, None].to(dtype).float()
    grid = IntegerGrid(8, 256, False, scale, torch.zeros_like(scale), dtype)
    stored = (torch.arange(256.0) * scale).to(dtype)  # every level of every scale
    assert grid.holds(stored)


def test_grid_notices_a_level_beyond_its_ends() -> None:
    weight = weights(2, 16)
    for symmetric in (True, False):
        grid = IntegerGrid.fit(weight, 3, symmetric=symmetric)
        stored = grid.round(weight)
        stored[0, 0] = float(levels(grid, 0, 0)[-1] + grid.scale[0, 0])
        assert not grid.holds(stored)


def test_group_of_zeros_has_a_harmless_scale() -> None:
    weight = weights(2, 16)
    weight[0, 8:] = 0.0
    for symmetric in (True, False):
        grid = IntegerGrid.fit(weight, 4, 8, symmetric)
        assert (grid.scale > 0).all()
        assert grid.scale.isfinite().all()
        assert (grid.round(weight)[0, 8:] == 0).all()


def test_minus_one_means_one_scale_for_every_output_row() -> None:
    weight = weights(5, 24)
    whole, same = IntegerGrid.fit(weight, 4, -1), IntegerGrid.fit(weight, 4, 24)
    assert torch.equal(whole.scale, same.scale)
    assert whole.scale.shape == (5, 1)
    assert torch.equal(whole.round(weight), same.round(weight))


def test_groups_run_along_the_inputs() -> None:
    weight = torch.tensor([[1.0, 1.0, 100.0, 100.0], [10.0, 10.0, 2.0, 2.0]])
    grid = IntegerGrid.fit(weight, 4, 2)
    expected = torch.tensor([[1.0, 100.0], [10.0, 2.0]]) / 7.5
    torch.testing.assert_close(grid.scale, expected)


def test_more_bits_and_smaller_groups_never_hurt_on_average() -> None:
    weight = weights(64, 128)

    def error(bits: int, size: int, symmetric: bool) -> float:
        grid = IntegerGrid.fit(weight, bits, size, symmetric)
        return float((grid.round(weight) - weight).square().sum())

    for symmetric in (True, False):
        by_bits = [error(bits, -1, symmetric) for bits in range(2, 9)]
        assert by_bits == sorted(by_bits, reverse=True)
        by_size = [error(4, size, symmetric) for size in (128, 64, 32, 16)]
        assert by_size == sorted(by_size, reverse=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rtn_is_the_grid_and_nothing_else(symmetric: bool) -> None:
    weight = weights(6, 32)
    result = method_of("rtn", bits=3, group_size=16, symmetric=symmetric).compress(weight, None)
    grid = IntegerGrid.fit(weight, 3, 16, symmetric)
    assert torch.equal(result.weight, grid.round(weight))
    assert result.damp is None


def test_rtn_without_groups_follows_a_permutation_of_the_inputs() -> None:
    weight = weights(6, 32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    method = method_of("rtn", bits=3, group_size=-1)
    expected = method.compress(weight, None).weight[:, order]
    assert torch.equal(method.compress(weight[:, order], None).weight, expected)


def test_group_that_does_not_divide_the_inputs_is_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match="100 does not divide the 4096 inputs of layer q_proj"):
        method_of("rtn", group_size=100).check_layer("q_proj", (64, 4096))
    with pytest.raises(UserError, match=r"128, .*64"):
        method_of("rtn", group_size=100).check_layer("q_proj", (64, 4096))
    method_of("rtn", group_size=64).check_layer("q_proj", (10, 4096))
    method_of("rtn", group_size=-1).check_layer("q_proj", (10, 50))


def test_sixteen_bits_need_no_fitting_group() -> None:
    method = method_of("rtn", bits=16, group_size=128)
    assert method.does_nothing
    method.check_layer("q_proj", (10, 50))
