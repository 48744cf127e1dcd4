"""HQQ against a slow loop of its definition and against every zero point of a fine scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.grids import GridSpec, IntegerGrid, RealZeroGrid
from lm_calib_plugin.quantization.parts import Setting
from lm_calib_plugin.quantization.rounding.hqq import HQQ, shrunk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(rows: int = 6, width: int = 64, seed: int = 0, size: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, width, generator=generator) * size
    w[0, 3] = 6 * size
    return w


def fitted(
    w: Tensor,
    bits: int = 3,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    method: HQQ | None = None,
) -> tuple[Tensor, RealZeroGrid, IntegerGrid]:
    grid = IntegerGrid.fit(w, bits, size, False, dtype)
    result = (method or HQQ()).round(w, grid, None, Setting())
    assert isinstance(result.grid, RealZeroGrid)
    return result.weight, result.grid, grid


def sums(w: Tensor, rounded: Tensor, size: int, p: float) -> np.ndarray:
    d = (w - rounded).double().abs().numpy()
    return (d**p).reshape(d.shape[0], -1, size).sum(axis=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_group_ends_worse_than_rounding_to_nearest(bits: int, dtype: torch.dtype) -> None:
    better = 0
    for seed in range(3):
        w = weights(seed=seed)
        before = w.clone()
        rounded, found, start = fitted(w, bits, 16, dtype)
        reached, nearest = sums(w, rounded, 16, 0.7), sums(w, start.round(w), 16, 0.7)
        assert (reached <= nearest * (1 + 1e-5)).all()
        better += int((reached < nearest * 0.99).sum())
        assert torch.equal(found.scale, start.scale)
        assert torch.equal(w, before)
    # With 8 bits, bfloat16 has hardly a number between two whole ones.
    assert better > (-1 if bits == 8 else 10)


def slow_hqq(group: np.ndarray, scale: float, zero: float, bits: int, o: HQQ) -> float:
    """The loop of one group, in float64; returns the zero point."""

    def rounded(z: float) -> np.ndarray:
        return np.clip(np.round(group / scale + z), 0, 2**bits - 1)

    best, beta = zero, o.beta
    smallest = np.sum(np.abs(group - scale * (rounded(zero) - zero)) ** o.p)
    for _ in range(o.steps):
        q = rounded(zero)
        r = group - scale * (q - zero)
        e = np.array(
            [np.sign(x) * max(abs(x) - abs(x) ** (o.p - 1) / beta, 0) if x else 0 for x in r]
        )
        zero = float(np.mean(q - (group - e) / scale))
        total = np.sum(np.abs(group - scale * (rounded(zero) - zero)) ** o.p)
        if total >= smallest:
            break
        best, smallest, beta = zero, total, beta * o.kappa
    return best


@pytest.mark.parametrize("method", [HQQ(), HQQ(0.9, 2.0, 1.1, 5), HQQ(steps=1), HQQ(0.5, 100)])
@pytest.mark.parametrize("size", [0.05, 3.0])
def test_equals_the_slow_loop(method: HQQ, size: float) -> None:
    close = 0
    for seed in range(3):
        w = weights(seed=seed, size=size)
        _, found, start = fitted(w, method=method)
        for i in range(6):
            for k in range(4):
                group = w[i, 16 * k : 16 * k + 16].double().numpy()
                args = float(start.scale[i, k]), float(start.zero[i, k]), 3, method
                close += abs(slow_hqq(group, *args) - float(found.zero[i, k])) < 1e-4
    # Where two sums are equal up to rounding, float32 may stop a step earlier or later.
    assert close >= 70


def test_hardly_worse_than_the_best_of_all_zero_points() -> None:
    w = weights(4, 32, size=0.05)
    rounded, _, start = fitted(w, 2, 16)
    reached = sums(w, rounded, 16, 0.7)
    nearest = sums(w, start.round(w), 16, 0.7)
    scan = np.inf
    for shift in torch.linspace(-1, 1, 401):
        grid = RealZeroGrid.of(start, start.zero + shift)
        scan = np.minimum(scan, sums(w, grid.round(w), 16, 0.7))
    assert (scan <= reached * (1 + 1e-3)).all()
    # It finds a good part of what there is to gain.
    gained = (nearest - reached).sum() / (nearest - scan).sum()
    assert gained > 0.3


def test_zero_steps_is_rounding_to_nearest() -> None:
    w = weights()
    rounded, found, start = fitted(w, method=HQQ(steps=0))
    assert torch.equal(found.zero, start.zero)
    torch.testing.assert_close(rounded, start.round(w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grid_holds_what_is_stored(bits: int, dtype: torch.dtype) -> None:
    for seed in range(3):
        w = weights(32, 128, seed).to(dtype).float() + (0.2 if seed == 2 else 0)
        rounded, found, _ = fitted(w, bits, 32, dtype)
        assert torch.equal(found.zero.to(dtype).float(), found.zero)
        assert torch.equal(found.round(rounded), rounded)
        assert found.holds(rounded.to(dtype))
        moved = rounded.to(dtype)
        moved[3, 5] += (0.4 * found.scale[3, 0]).to(dtype)
        assert bits == 8 or not found.holds(moved)


def test_levels_of_the_grid_written_out() -> None:
    w = weights()
    rounded, found, _ = fitted(w)
    for i in range(6):
        for j in range(64):
            scale, zero = float(found.scale[i, j // 16]), float(found.zero[i, j // 16])
            values = (np.arange(8) - zero) * scale
            nearest = values[np.abs(values - float(w[i, j])).argmin()]
            assert float(rounded[i, j]) == pytest.approx(nearest, abs=1e-6)
        assert torch.equal(found.round_column(w[:, 20], 1), rounded[:, 20])
    assert not found.has_zero
    assert IntegerGrid.has_zero
    assert found.stored_bits((6, 64)) == 6 * 64 * 3 + 6 * 4 * (32 + 32)
    assert fitted(w, dtype=torch.bfloat16)[1].stored_bits((6, 64)) == 6 * 64 * 3 + 6 * 4 * 32


def test_zeros_stay_finite_and_rows_do_not_see_each_other() -> None:
    w = weights()
    w[2] = 0
    rounded, _, _ = fitted(w)
    assert rounded.isfinite().all()
    assert (rounded[2] == 0).all()
    torch.testing.assert_close(fitted(w[1:4])[0], rounded[1:4], rtol=0, atol=0)


def test_shrinkage_is_the_published_one() -> None:
    x = torch.tensor([0.0, 0.5, -2.0, 0.01])
    expected = [0.0, 0.5 - 0.5**-0.3 / 10, -(2 - 2**-0.3 / 10), 0.0]
    torch.testing.assert_close(shrunk(x, 10, 0.7), torch.tensor(expected))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (GridSpec("int", 4, 64, True), "symmetric=false"),
        (GridSpec("fp8", 8, -1), "symmetric=false"),
        (GridSpec("nvfp4", 4, 16, False), "rounding=rtn"),
    ],
)
def test_grids_without_zero_points_are_refused(spec: GridSpec, words: str) -> None:
    with pytest.raises(UserError, match=words):
        HQQ().check(spec)


def test_asymmetric_integers_are_taken() -> None:
    HQQ().check(GridSpec("int", 4, 64, False))


@pytest.mark.parametrize(
    "options", [{"p": "1.5"}, {"p": "0"}, {"beta": "0"}, {"kappa": "0.9"}, {"steps": "-1"}]
)
def test_bad_options_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        HQQ.from_texts(options)
