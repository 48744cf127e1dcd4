"""Small floating point numbers against their definition: all values written out, nearest taken."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.quantization.numbers import (
    mxfp4_round,
    mxfp4_scale,
    nvfp4_factor,
    nvfp4_round,
    nvfp4_scale,
    power_of_two_below,
    round_e2m1,
    round_fp8,
    to_fp8,
)


def positive_values(exponent_bits: int, mantissa_bits: int, bias: int) -> list[Fraction]:
    """Every non-negative value of a small format by its bits, in rising order of the code."""
    found = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        part = Fraction(mantissa, 2**mantissa_bits)
        power = Fraction(2) ** (max(exponent, 1) - bias)
        found.append((part + 1 if exponent else part) * power)
    return found


E2M1 = positive_values(2, 1, 1)
E4M3 = positive_values(4, 3, 7)[:-1]  # the last code is NaN


def nearest(values: list[Fraction], x: float) -> float:
    """The nearest value, the one with the even code among two; exact arithmetic."""
    size = abs(Fraction(x))
    best = min(range(len(values)), key=lambda code: (abs(values[code] - size), code % 2))
    return float(values[best]) * (-1 if x < 0 else 1)


def probes(values: list[Fraction], seed: int = 0) -> list[float]:
    """Every value, every tie, both neighbors of every tie, and random numbers; both signs."""
    ties = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    exact = torch.tensor([float(v) for v in values + ties])
    spread = torch.rand(500, generator=torch.Generator().manual_seed(seed)) * 1.3
    found = torch.cat(
        [
            exact,
            torch.nextafter(exact, torch.tensor(torch.inf)),
            torch.nextafter(exact, torch.tensor(0.0)),
            spread * float(values[-1]),
            spread * float(values[2]),
        ]
    )
    return torch.cat([found, -found]).tolist()


def test_formats_written_out_are_those_of_the_specification() -> None:
    assert [float(v) for v in E2M1] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert float(E4M3[-1]) == 448
    assert float(E4M3[1]) == 2**-9
    assert len(E4M3) == 127


def test_e2m1_is_nearest_with_ties_to_the_even_mantissa() -> None:
    xs = probes(E2M1)
    assert round_e2m1(torch.tensor(xs)).tolist() == [nearest(E2M1, x) for x in xs]


def test_e4m3_is_nearest_with_ties_to_the_even_mantissa() -> None:
    xs = probes(E4M3)
    assert to_fp8(torch.tensor(xs)).tolist() == [nearest(E4M3, x) for x in xs]
    scale = torch.tensor(0.25)
    scaled = round_fp8(torch.tensor(xs) / 4, scale)
    assert scaled.tolist() == [nearest(E4M3, x) / 4 for x in xs]


def test_values_beyond_the_largest_are_cut_and_nan_stays() -> None:
    far = torch.tensor([7.0, -1e30, torch.inf, -torch.inf])
    assert round_e2m1(far).tolist() == [6.0, -6.0, 6.0, -6.0]
    assert to_fp8(far * 100).tolist() == [448.0, -448.0, 448.0, -448.0]
    assert round_e2m1(torch.tensor([torch.nan])).isnan().all()
    assert to_fp8(torch.tensor([torch.nan])).isnan().all()


def test_arguments_are_left_alone() -> None:
    x = torch.randn(4, 64)
    before = x.clone()
    for work in (round_e2m1, to_fp8, nvfp4_round, mxfp4_round):
        work(x)
        assert torch.equal(x, before)
    round_fp8(x, torch.ones(4, 1))
    assert torch.equal(x, before)


def test_power_of_two_is_exact_also_beside_a_power() -> None:
    for exponent in range(-126, 128):
        power = torch.tensor(2.0**exponent)
        above = torch.nextafter(power, torch.tensor(torch.inf))
        below = torch.nextafter(power, torch.tensor(0.0))
        assert float(power_of_two_below(power)) == 2.0**exponent
        assert float(power_of_two_below(above)) == 2.0**exponent
        if exponent > -126:
            assert float(power_of_two_below(below)) == 2.0 ** (exponent - 1)


def slow_mxfp4(group: list[float]) -> list[float]:
    # The largest value counts as the next power of two from 7/4 on: times 8/7 it is beyond it.
    amax = max(Fraction(abs(x)) for x in group) * Fraction(8, 7)
    if amax == 0:
        return [0.0] * len(group)
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= amax:
        exponent += 1
    while Fraction(2) ** exponent > amax:
        exponent -= 1
    scale = Fraction(2) ** (exponent - 2)
    return [float(scale) * nearest(E2M1, float(Fraction(x) / scale)) for x in group]


def samples(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.logspace(-6, 4, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp4_equals_exact_arithmetic(dtype: torch.dtype) -> None:
    x = samples(12, 2, 64).to(dtype)
    x[3, 0, :32] = 0
    expected = [[slow_mxfp4(g) for g in row] for row in x.double().reshape(24, 2, 32).tolist()]
    found = mxfp4_round(x)
    assert found.dtype == torch.float32
    assert found.reshape(24, 2, 32).tolist() == expected


def slow_nvfp4(line: list[float], largest: float) -> list[float]:
    """Steps of the format in double precision; nothing here lies within 1e-6 of a tie."""
    factor = 448 * 6 / largest
    found = []
    for start in range(0, len(line), 16):
        group = line[start : start + 16]
        stored = nearest(E4M3, max(abs(x) for x in group) * factor / 6)
        scale = (stored or 1 / 8) / factor
        found += [scale * nearest(E2M1, x / scale) for x in group]
    return found


@pytest.mark.parametrize("whole", [True, False])
def test_nvfp4_equals_the_steps_of_the_format(whole: bool) -> None:
    x = samples(12, 64)
    x[4, :16] = 0
    x[5, 16:32] *= 1e-5  # its scale would be 0
    largest = x.abs().amax() if whole else None
    found = nvfp4_round(x, largest)
    for row, line in zip(x.double().tolist(), found.double(), strict=True):
        most = float(x.abs().amax()) if whole else max(map(abs, row))
        expected = torch.tensor(slow_nvfp4(row, most), dtype=torch.float64)
        torch.testing.assert_close(line, expected, rtol=1e-6, atol=0)


def test_rows_of_activations_do_not_see_each_other() -> None:
    x = samples(6, 3, 64)
    for work in (nvfp4_round, mxfp4_round):
        assert torch.equal(work(x)[2:4], work(x[2:4]))


@pytest.mark.parametrize("work", [nvfp4_round, mxfp4_round])
def test_zeros_and_tiny_values_stay_finite(work: object) -> None:
    assert callable(work)
    zeros = torch.zeros(2, 32)
    assert torch.equal(work(zeros), zeros)
    for size in (1e-30, 1e-38, 1e-44):
        tiny = torch.full((1, 32), size)
        found = work(tiny)
        assert found.isfinite().all()
        assert (found - tiny).abs().max() <= max(size, 1.2e-38)


def test_scales_of_tiny_groups_are_tiny() -> None:
    amax = torch.tensor([1e-30, 1e-38, 1e-44])
    assert (mxfp4_scale(amax) <= 2.0**-100).all()
    assert (mxfp4_scale(amax) > 0).all()


def test_scales_are_values_of_their_formats() -> None:
    amax = samples(64, 3).abs().amax(dim=1)
    powers = mxfp4_scale(amax)
    assert (powers.log2() == powers.log2().round()).all()
    largest = amax.amax()
    stored = nvfp4_scale(amax, largest) * nvfp4_factor(largest)
    values = torch.tensor([float(v) for v in E4M3])
    torch.testing.assert_close(
        stored, values[(stored[:, None] - values).abs().argmin(dim=1)], rtol=1e-6, atol=0
    )
    assert float(stored.max()) == pytest.approx(448)
