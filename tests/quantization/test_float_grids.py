"""Grids of floating point numbers against their definition, level by level in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.float_grids import FloatGrid, NVFP4Grid
from lm_calib_plugin.quantization.grids import Grid, GridSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP8_ROW = GridSpec("fp8", 8, -1)
SPECS = [FP8_ROW, GridSpec("fp8", 8, 16), GridSpec("nvfp4", 4, 16), GridSpec("mxfp4", 4, 32)]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
)


def weights(rows: int = 6, width: int = 64, seed: int = 0) -> Tensor:
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[0, :16] = 0
    w[1, 16:32] *= 1e-4
    w[2] *= 50
    w[3, 5] = 0.7
    return w


def size_of(spec: GridSpec, width: int) -> int:
    return width if spec.group_size == -1 else spec.group_size


def slow_scale(spec: GridSpec, group: np.ndarray, largest: float, shrink: float = 1.0) -> float:
    amax = float(np.abs(group).max()) * shrink
    if spec.number == "fp8":
        return amax / 448 if amax else 1.0
    if spec.number == "mxfp4":
        return 2.0 ** (math.floor(math.log2(amax)) - 2) if amax else 1.0
    factor = 448 * 6 / largest
    stored = E4M3[np.abs(E4M3 - amax / 6 * factor).argmin()]
    return max(float(stored), 2.0**-9) / factor


def slow_round(spec: GridSpec, weight: Tensor, shrink: float = 1.0) -> np.ndarray:
    w = weight.double().numpy()
    size, values = size_of(spec, w.shape[1]), E4M3 if spec.number == "fp8" else E2M1
    found = np.zeros_like(w)
    for i in range(w.shape[0]):
        for start in range(0, w.shape[1], size):
            group = w[i, start : start + size]
            scale = slow_scale(spec, group, float(np.abs(w).max()), shrink)
            for j, x in enumerate(group):
                value = values[np.abs(values * scale - abs(x)).argmin()]
                found[i, start + j] = np.sign(x) * value * scale
    return found


@pytest.mark.parametrize("shrink", [None, 0.8])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_the_definition(spec: GridSpec, shrink: float | None) -> None:
    for seed in range(3):
        w = weights(seed=seed)
        factor = None if shrink is None else torch.tensor(shrink)
        found = spec.fit(w, shrink=factor).round(w).double().numpy()
        np.testing.assert_allclose(found, slow_round(spec, w, shrink or 1.0), rtol=2e-6, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_level_is_reached_and_kept(spec: GridSpec) -> None:
    """All values of the format at once, in groups whose scale is a power of two."""
    values = E4M3 if spec.number == "fp8" else E2M1
    size = size_of(spec, 256)
    line = np.resize(np.concatenate([values[::-1], -values[::-1]]), 256)
    if spec.number == "fp8":
        line.reshape(-1, size)[:, 0] = values[-1]
    w = torch.tensor(line, dtype=torch.float32)[None] * 0.25
    grid = spec.fit(w)
    assert torch.equal(grid.round(w), w)
    assert grid.holds(w)
    assert grid.clipped(w) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_holds_its_own_rounding_in_every_dtype(spec: GridSpec, dtype: torch.dtype) -> None:
    for seed in range(4):
        w = weights(32, 256, seed).to(dtype).float()
        grid = spec.fit(w, dtype)
        rounded = grid.round(w)
        assert torch.equal(grid.round(rounded), rounded)
        stored = rounded.to(dtype)
        assert grid.holds(stored)
        moved = stored.clone()
        moved[4, 7] = float(grid.scale[4, 0]) * 1.25 if grid.bits == 4 else 457.0
        assert not grid.holds(moved)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_columns_are_rounded_as_the_whole(spec: GridSpec) -> None:
    w = weights()
    grid = spec.fit(w)
    whole = grid.round(w)
    for j in range(w.shape[1]):
        assert torch.equal(grid.round_column(w[:, j], j // grid.group_size), whole[:, j])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fitting_changes_nothing_and_zeros_are_harmless(spec: GridSpec) -> None:
    w = weights()
    before = w.clone()
    for given in (w, torch.zeros(2, 64), torch.full((2, 64), 1e-30), torch.full((2, 64), 1e-40)):
        grid = spec.fit(given)
        assert (grid.scale > 0).all()
        assert grid.scale.isfinite().all()
        rounded = grid.round(given)
        assert rounded.isfinite().all()
        assert ((rounded == 0) | (given != 0)).all()
        assert grid.holds(rounded)
    assert torch.equal(w, before)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_lies_beyond_is_cut_and_counted(spec: GridSpec) -> None:
    w = torch.ones(1, 64)
    grid = spec.fit(w, shrink=torch.tensor(0.5))
    assert grid.clipped(w) == 1.0
    end = 6 * 0.125 if spec.number == "mxfp4" else 0.5
    torch.testing.assert_close(grid.round(w), torch.full((1, 64), end), rtol=0.1, atol=0)
    far = spec.fit(w).round(torch.full((1, 64), 100.0))
    assert (far <= 1.5).all()  # mxfp4 reaches up to 6 / 4


def test_only_mxfp4_cuts_by_itself() -> None:
    w = weights(32, 256)
    for spec in SPECS:
        # Between 6 and 8 times the scale: more than half a step means beyond 7.
        share = spec.fit(w).clipped(w)
        assert (share > 0) == (spec.number == "mxfp4")
        assert share < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_scales_are_numbers_of_the_dtype(dtype: torch.dtype) -> None:
    grid = FP8_ROW.fit(weights(), dtype)
    assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
    assert grid.scale.shape == (6, 1)


def test_nvfp4_gives_back_the_scales_it_stores() -> None:
    w = weights()
    grid = GridSpec("nvfp4", 4, 16).fit(w)
    assert isinstance(grid, NVFP4Grid)
    stored = grid.stored_scale
    assert torch.equal(stored.to(torch.float8_e4m3fn).float(), stored)
    torch.testing.assert_close(stored / grid.factor, grid.scale, rtol=1e-7, atol=0)
    assert float(stored.max()) == 448
    assert float(grid.factor) == pytest.approx(448 * 6 / float(w.abs().max()))


def test_stored_bits_are_counted_one_by_one() -> None:
    w = weights()
    shape = (6, 64)
    count = 6 * 64

    def bits(spec: GridSpec, dtype: torch.dtype = torch.float32) -> float:
        return spec.fit(w, dtype).stored_bits(shape)

    assert bits(FP8_ROW) == 8 * count + 6 * 32
    assert bits(FP8_ROW, torch.bfloat16) == 8 * count + 6 * 16
    assert bits(GridSpec("fp8", 8, 16), torch.float16) == 8 * count + 6 * 4 * 16
    assert bits(GridSpec("nvfp4", 4, 16)) == (4 + 8 / 16) * count + 32
    assert bits(GridSpec("mxfp4", 4, 32)) == (4 + 8 / 32) * count


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (GridSpec("nvfp4", 4, 32), "group_size=16"),
        (GridSpec("mxfp4", 4, -1), "group_size=32"),
        (GridSpec("fp8", 4, -1), "bits=8"),
        (GridSpec("fp6", 6, -1), "int, fp8, nvfp4, mxfp4"),
    ],
)
def test_what_a_format_does_not_have_is_refused(spec: GridSpec, words: str) -> None:
    with pytest.raises(UserError, match=words):
        spec.fit(weights())


def test_grids_say_what_they_are() -> None:
    for spec in SPECS:
        grid: Grid = spec.fit(weights())
        assert isinstance(grid, FloatGrid)
        assert grid.number == spec.number
        assert grid.bits == spec.bits
        assert grid.has_zero
