"""Rounded activations, against loops over single values in float64."""

from __future__ import annotations

import copy
import gc
import math
import struct

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.activations import (
    ActivationQuantizer,
    ActivationSpec,
    round_tokens,
)

INT8 = ActivationSpec()
FP8 = ActivationSpec("fp8", dynamic=False)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.logspace(-2, 2, shape[-1])


def even(value: float) -> float:
    """Round to the nearest whole number, halves to the even one."""
    low = math.floor(value)
    rest = value - low
    if rest == 0.5:
        return float(low if low % 2 == 0 else low + 1)
    return float(low if rest < 0.5 else low + 1)


def single(value: float) -> float:
    """Round to the nearest float32; a quotient of two of these, in float64 before, stays right."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def naive_integers(row: list[float], bits: int, amax: float | None = None) -> list[float]:
    amax = max(abs(v) for v in row) if amax is None else single(amax)
    # The largest value of a token lies half way between levels, where the last bit decides.
    scale = single(amax / ((2**bits - 1) / 2)) or 1.0
    levels = [even(single(v / scale)) for v in row]
    return [min(max(q, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) * scale for q in levels]


def naive_fp8(row: list[float], amax: float | None = None) -> list[float]:
    """Nearest of all e4m3 values, which are listed by sign, exponent and mantissa."""
    sizes = [m / 8 * 2.0**-6 for m in range(8)]
    sizes += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
    assert max(sizes) == 448
    levels = sorted({s * v for v in sizes for s in (1, -1)})
    amax = max(abs(v) for v in row) if amax is None else amax
    scale = amax / 448 if amax else 1.0
    return [min(levels, key=lambda level: abs(level * scale - v)) * scale for v in row]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dynamic_integers_are_those_of_a_loop(bits: int) -> None:
    x = tokens(3, 4, 12)
    x[1, 2] = 0
    found = ActivationSpec("int", bits).round(x)
    expected = [[naive_integers(row, bits) for row in part] for part in x.double().tolist()]
    assert torch.equal(found, torch.tensor(expected).float())
    assert (found[1, 2] == 0).all()


def test_the_largest_value_of_a_token_is_half_a_step_beyond_the_highest_level() -> None:
    x = torch.tensor([[127.5, -127.5, 1.0, 0.4], [-127.5, 3.6, 2.4, 0.0]])
    assert INT8.round(x).tolist() == [[127, -128, 1, 0], [-128, 4, 2, 0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_value_is_an_outermost_level(bits: int) -> None:
    spec = ActivationSpec("int", bits)
    x = -torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) - 0.1
    lowest = spec.levels(x, spec.scale(x.abs()))
    # The last bit of the division decides between two.
    assert ((lowest == spec.lowest) | (lowest == spec.lowest + 1)).all()
    assert (spec.levels(-x, spec.scale(x.abs())) == spec.highest).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spec", [ActivationSpec("int", b, False) for b in (2, 4, 7, 8)] + [FP8])
def test_a_dtype_stores_the_scale_of_a_limit(spec: ActivationSpec, dtype: torch.dtype) -> None:
    for wanted in torch.logspace(-3, 4, 200).tolist():
        limit = spec.storable(wanted, dtype)
        scale = spec.scale(torch.tensor(limit))
        assert float(scale.to(dtype)) == float(scale)
        assert spec.storable(limit, dtype) == limit
        # The nearest: off by half a unit of the last place at most, down to the normal numbers.
        info = torch.finfo(dtype)
        assert abs(limit - wanted) <= max(wanted, info.tiny * spec.span) * info.eps * 0.5001
    assert spec.storable(0.1, torch.float32) == 0.1


def test_the_factor_of_a_limit_is_stored_in_float32() -> None:
    assert ActivationSpec("nvfp4", dynamic=False).storable(0.1, torch.bfloat16) == 0.1


@pytest.mark.parametrize("amax", [0.5, 3.0, 200.0])
@pytest.mark.parametrize("number", ["int", "fp8"])
def test_static_levels_span_the_limit_and_clip_beyond(number: str, amax: float) -> None:
    x = tokens(5, 16)
    found = ActivationSpec(number, dynamic=False).round(x, torch.tensor(amax))
    rows = x.double().tolist()
    expected = [naive_integers(r, 8, amax) if number == "int" else naive_fp8(r, amax) for r in rows]
    torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=1e-5, atol=1e-6)
    assert found.abs().max() <= amax * 256 / 255 * 1.0001


def test_dynamic_fp8_is_that_of_a_loop() -> None:
    x = tokens(6, 20)
    expected = torch.tensor([naive_fp8(row) for row in x.double().tolist()]).float()
    torch.testing.assert_close(ActivationSpec("fp8").round(x), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("number", "size"), [("nvfp4", 16), ("mxfp4", 32)])
def test_block_formats_treat_tokens_one_by_one(number: str, size: int) -> None:
    x = tokens(2, 3, 2 * size)
    spec = ActivationSpec(number)
    whole = spec.round(x)
    for i in range(2):
        for j in range(3):
            assert torch.equal(whole[i, j], spec.round(x[i, j]))
    assert len(whole[0, 0, :size].abs().unique()) <= 8
    assert spec.bits == 4


def test_static_nvfp4_shares_one_factor_fixed_before() -> None:
    x = tokens(4, 32)
    spec = ActivationSpec("nvfp4", dynamic=False)
    found = spec.round(x, x.abs().max())
    assert torch.equal(found[2], spec.round(x[2], x.abs().max()))
    # Block scales of e4m3 reach the limit; beyond it they saturate.
    assert float(spec.round(x * 10, x.abs().max()).abs().max()) <= float(x.abs().max()) * 1.0001


@pytest.mark.parametrize("number", ["int", "fp8", "nvfp4", "mxfp4"])
def test_tokens_without_anything_and_tiny_ones_stay_finite(number: str) -> None:
    x = torch.zeros(3, 32)
    x[1] = 1e-42
    x[2] = torch.linspace(-1, 1, 32) * 3e38
    found = ActivationSpec(number).round(x)
    assert found.isfinite().all()
    assert (found[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_stays_and_scales_are_float32(dtype: torch.dtype) -> None:
    x = tokens(4, 16).to(dtype)
    found = ActivationQuantizer(INT8)(x)
    assert found.dtype == dtype
    assert torch.equal(found, INT8.round(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_keys_and_values_do_not_hang_on_the_last_bit(bits: int, dtype: torch.dtype) -> None:
    spec, x = ActivationSpec("int", bits), tokens(40, 16)
    x[:, 0] = -x.abs().amax(dim=-1) - torch.rand(40, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(1)
    for moved in (x, torch.nextafter(x, zero), torch.nextafter(x, 2 * x)):
        given = moved.to(dtype)
        found = round_tokens(given, bits)
        scale = spec.scale(given.float().abs().amax(dim=-1))
        assert found.dtype == dtype
        assert torch.equal(found[:, 0], (spec.lowest * scale).to(dtype))
        near = (given.float() - found.float()).abs()[:, 1:]
        assert (near <= scale[:, None] * (0.5001 + 2**bits * torch.finfo(dtype).eps)).all()


def test_a_quantizer_keeps_its_limit_through_casts_and_stores_nothing() -> None:
    quantizer = ActivationQuantizer(ActivationSpec(dynamic=False), 0.1)
    exact = torch.tensor(0.1)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        quantizer.to(cast)
        assert quantizer.limit is not None
        assert quantizer.limit.dtype == torch.float32
        assert torch.equal(quantizer.limit, exact)
    assert quantizer.scale == exact / 127.5
    assert not quantizer.state_dict()
    assert repr(quantizer) == "ActivationQuantizer(int8 static, limit=0.1)"
    assert repr(ActivationQuantizer(INT8)) == "ActivationQuantizer(int8 dynamic)"
    assert ActivationQuantizer(INT8).scale is None


def test_the_same_tensor_is_rounded_once() -> None:
    quantizer = ActivationQuantizer(INT8)
    x = tokens(3, 8)
    first = quantizer(x)
    assert quantizer(x) is first
    assert torch.equal(quantizer(x.clone()), first)
    assert quantizer(x.clone()) is not first


def test_a_change_in_place_is_seen() -> None:
    quantizer = ActivationQuantizer(INT8)
    x = tokens(3, 8)
    quantizer(x)
    with torch.no_grad():
        x.mul_(3.7)
    assert torch.equal(quantizer(x), INT8.round(x))
    with torch.inference_mode():
        y = tokens(3, 8)
        quantizer(y)
        y.mul_(3.7)
        assert torch.equal(quantizer(y), INT8.round(y))


def test_results_do_not_outlive_their_input() -> None:
    quantizer = ActivationQuantizer(INT8)
    x = tokens(3, 8)
    quantizer(x)
    assert quantizer._last
    del x
    gc.collect()
    assert not quantizer._last
    x = tokens(3, 8)
    quantizer(x)
    assert not copy.deepcopy(quantizer)._last
    assert quantizer._last


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("int9",), "one of int, fp8, nvfp4, mxfp4"),
        (("int", 1), "for int: 2 to 8"),
        (("int", 16), "for int: 2 to 8"),
        (("fp8", 4), "for fp8: 8"),
        (("nvfp4", 3), "for nvfp4: 4"),
        (("mxfp4", 4, False), "act_dynamic=true"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ActivationSpec(*arguments)


@pytest.mark.parametrize(
    ("dynamic", "limit"), [(True, 1.0), (False, None), (False, 0.0), (False, math.inf)]
)
def test_static_and_only_static_needs_a_limit(dynamic: bool, limit: float | None) -> None:
    with pytest.raises(ValueError, match="with the limit"):
        ActivationQuantizer(ActivationSpec(dynamic=dynamic), limit)


def test_widths_have_to_hold_whole_blocks() -> None:
    with pytest.raises(UserError, match=r"model\.0\.down_proj has 172.*ignore=down_proj"):
        ActivationSpec("nvfp4").check_width("model.0.down_proj", 172)
    with pytest.raises(UserError, match="multiples of 32"):
        ActivationSpec("mxfp4").check_width("x", 48)
    ActivationSpec("nvfp4").check_width("x", 48)
    ActivationSpec("int").check_width("x", 7)
