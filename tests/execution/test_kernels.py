"""Kernels against the simulated layer, against their emulation, and against slow loops."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.execution import (
    Activation,
    Device,
    FP8Linear,
    Int4WeightOnly,
    Int8CPULinear,
    Int8Linear,
    PackedLinear,
    SemiSparseLinear,
)
from lm_calib_plugin.execution.base import simulated
from lm_calib_plugin.execution.choose import TOLERANCE
from lm_calib_plugin.execution.levels import UnpackableError, quantize_rows, simulate_rows
from lm_calib_plugin.quantization.activations import ActivationQuantizer, ActivationSpec
from lm_calib_plugin.quantization.grids import GridSpec, IntegerGrid, RealZeroGrid
from tests.execution.cases import (
    BF16,
    CASES,
    HOPPER,
    OUT,
    W4,
    W8,
    WIDTH,
    Case,
    normal,
    slow_integer,
)

HERE = Device.of("cpu")
# What computes on this machine, be it fast or not: the operators of CUDA kernels exist on CPUs too.
ON_CPU = [name for name in CASES if name != "2:4"]


def runnable(case: Case) -> None:
    """Skip a kernel that this machine's torch cannot run."""
    if case.kernel is Int8CPULinear and (why := case.kernel.refusal(case.facts(HERE))):
        pytest.skip(why)


def pack(case: Case, bias: bool = False, **shape: int) -> tuple[PackedLinear, Any, Any, Any]:
    runnable(case)
    weight, grid = case.weight(**shape)
    added = nn.Parameter(normal(len(weight), seed=9).to(case.dtype)) if bias else None
    return case.kernel.from_layer(weight, grid, added, case.activation), weight, grid, added


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_emulation_is_the_simulated_layer_within_rounding(name: str, bias: bool) -> None:
    case = CASES[name]
    weight, grid = case.weight()
    added = normal(OUT, seed=9).to(case.dtype) if bias else None
    rows = case.inputs()
    found = case.kernel.emulate(rows, weight, grid, added, case.activation)
    wanted = simulated(rows, weight, added, case.activation)
    assert found.shape == wanted.shape
    assert distance(found, wanted) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_kernel_is_its_emulation(name: str, tokens: int) -> None:
    case = CASES[name]
    packed, weight, grid, bias = pack(case, bias=True)
    rows = case.inputs(tokens + 1)[1:]
    with torch.no_grad():
        found = packed(rows)
    wanted = case.kernel.emulate(rows, weight, grid, bias, case.activation).to(case.dtype)
    assert found.dtype == case.dtype
    if case.dtype == torch.float32:
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)
    else:
        assert distance(found, wanted) < 4e-3


@pytest.mark.parametrize("name", ["int8", "int8_static", "w4a8", "w4a4", "int8_cpu", "w4a4_cpu"])
def test_integer_kernels_against_a_loop(name: str) -> None:
    case = CASES[name]
    packed, weight, grid, _ = pack(case, out=16, width=32)
    rows = case.inputs(5, 32)
    assert case.activation is not None
    wanted = slow_integer(rows, weight, grid, case.activation)
    torch.testing.assert_close(packed(rows).double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kernel", [Int8Linear, Int8CPULinear])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_levels_do_not_saturate(kernel: type[PackedLinear], sign: int) -> None:
    case = Case(kernel, torch.float32, W8, Activation("int", 8, False, 1.0))
    runnable(case)
    out, width = 16, 512
    one = torch.ones(out, 1)
    grid = IntegerGrid(8, width, True, one, torch.zeros_like(one), torch.float32)
    weight = torch.full((out, width), -128.0)
    weight[::2] = 127.0
    rows = torch.full((20, width), 127.0 if sign > 0 else -128.0)
    found = kernel.from_layer(weight, grid, None, case.activation)(rows)
    assert torch.equal(found.double(), rows.double() @ weight.double().t())


def test_fp8_kernel_multiplies_e4m3_values() -> None:
    case = CASES["fp8"]
    packed, weight, _, _ = pack(case)
    rows = case.inputs()
    scale = rows.float().abs().amax(dim=1, keepdim=True) / 448
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    table = table[table.isfinite()]
    place = rows.float() / torch.where(scale > 0, scale, 1.0)
    nearest = table[(place[..., None] - table).abs().argmin(dim=-1)]
    wanted = (nearest.double() * scale.double()) @ weight.double().t()
    assert distance(packed(rows), wanted) < 5e-3


def test_int4_weights_are_the_formula_of_the_operator() -> None:
    for name in ("int4_g32", "int4_asymmetric"):
        packed, weight, grid, _ = pack(CASES[name])
        assert isinstance(packed, Int4WeightOnly)
        seen = packed(torch.eye(WIDTH, dtype=BF16)).t().float()
        step = grid.scale.repeat_interleave(packed.group_size, dim=1)
        # Two roundings to bfloat16, of `zero` and of the weight, each of up to 2^-9 of 16 steps.
        most = step / 64 + weight.float().abs() * 2**-8
        off = (seen - weight.float()).abs()
        assert bool((off <= most).all()), name
        if grid.symmetric:
            assert torch.equal(seen, weight.float())


@pytest.mark.parametrize("name", ON_CPU)
def test_weight_comes_back_bit_by_bit(name: str) -> None:
    packed, weight, _, bias = pack(CASES[name], bias=True)
    assert torch.equal(packed.weight, weight)
    assert packed.weight.dtype == weight.dtype
    state = nn.Sequential(packed).state_dict()
    assert set(state) == {"0.weight", "0.bias"}
    assert torch.equal(state["0.weight"], weight)
    assert packed.bias is bias


@pytest.mark.parametrize("name", ON_CPU)
def test_shapes_and_bytes(name: str) -> None:
    case = CASES[name]
    packed, weight, _, _ = pack(case)
    rows = case.inputs(6)
    flat = packed(rows)
    assert torch.equal(packed(rows.reshape(2, 3, WIDTH)), flat.reshape(2, 3, OUT))
    assert packed(rows[:0]).shape == (0, OUT)
    assert (packed.in_features, packed.out_features) == (WIDTH, OUT)
    each = 4 if case.kernel is Int4WeightOnly else 8
    # Levels, and at most a float32 scale, or a scale, zero and zero point of a group.
    groups = weight.numel() // (packed.group_size if each == 4 else WIDTH)  # type: ignore[operator]
    assert 0 <= packed.weight_bytes - weight.numel() * each // 8 <= 5 * groups


def test_a_token_does_not_depend_on_its_batch() -> None:
    for name in ("int8", "int8_cpu"):
        packed, *_ = pack(CASES[name])
        rows = CASES[name].inputs(40)
        alone = torch.cat([packed(row[None]) for row in rows])
        assert torch.equal(packed(rows), alone)


def test_weights_off_the_grid_are_not_packed() -> None:
    for name in ON_CPU:
        case = CASES[name]
        runnable(case)
        weight, grid = case.weight()
        # Between 2 and 3; for e4m3 between 16 and 18.
        weight[3, 5] = grid.scale[3, 0] * (17 if case.kernel is FP8Linear else 2.4)
        with pytest.raises(UnpackableError, match=r"1 of \d+ weights are not levels"):
            case.kernel.from_layer(weight, grid, None, case.activation)


def test_what_a_kernel_cannot_hold_exactly_is_not_packed() -> None:
    spec = GridSpec("int", 4, 64)
    weight = normal(OUT, WIDTH)
    grid = spec.fit(weight, torch.float32)
    with pytest.raises(UnpackableError, match="bfloat16 numbers"):
        Int4WeightOnly.from_layer(grid.round(weight), grid, None, None)
    pruned, _ = CASES["2:4"].weight()
    pruned[0, :3] = 1
    with pytest.raises(UnpackableError, match="more than two of some four"):
        SemiSparseLinear.from_layer(pruned, None, None, None)


def test_a_row_of_zeros_and_a_clipped_row() -> None:
    levels, scale = quantize_rows(torch.tensor([[0.0, 0.0], [-1.0, 2.0]]), Activation())
    assert levels.tolist() == [[0, 0], [-64, 127]]
    assert scale.flatten().tolist() == pytest.approx([1.0, 2 / 127.5])
    levels, _ = quantize_rows(torch.tensor([[9.0, -9.0]]), Activation("int", 4, False, 1.0))
    assert levels.tolist() == [[7, -8]]
    levels, _ = quantize_rows(torch.tensor([[900.0, 1.0]]), Activation("fp8", 8, False, 1.0))
    assert levels.float().tolist() == [[448, 1]]
    assert quantize_rows(torch.ones(1, 2, dtype=BF16), Activation())[1].dtype == torch.float32


@pytest.mark.parametrize("number", ["int", "fp8"])
@pytest.mark.parametrize("limit", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_inputs_are_rounded_as_by_the_simulated_model(
    number: str, limit: float | None, dtype: torch.dtype
) -> None:
    for bits in (4, 8) if number == "int" else (8,):
        quantizer = ActivationQuantizer(ActivationSpec(number, bits, limit is None), limit)
        rows = CASES["int8"].inputs(300).to(dtype)
        rows[1], rows[2] = 1e-38, 1e-42
        assert torch.equal(simulate_rows(rows, Activation.of(quantizer)), quantizer(rows))


def test_zero_points_that_are_no_integers() -> None:
    case = CASES["int4_asymmetric"]
    weight = normal(OUT, WIDTH)
    fitted = case.spec.fit(weight, BF16)  # type: ignore[union-attr]
    grid = RealZeroGrid.of(fitted, fitted.zero + 0.25)  # type: ignore[arg-type, attr-defined]
    evaluated = grid.round(weight).to(BF16)
    packed = Int4WeightOnly.from_layer(evaluated, grid, None, None)
    rows = case.inputs()
    assert torch.equal(packed.weight, evaluated)
    assert distance(packed(rows), simulated(rows, evaluated, None, None)) < 1e-2


def test_moving_casting_and_gradients_are_refused() -> None:
    packed, *_ = pack(CASES["int8"])
    with pytest.raises(UserError, match="moved to cpu and torch.bfloat16"):
        nn.Sequential(packed).to(BF16)
    packed.to("cpu").float()
    rows = CASES["int8"].inputs().requires_grad_()
    with pytest.raises(UserError, match="execution=simulated"):
        packed(rows).sum().backward()


def changed(name: str, **fields: Any) -> Case:
    return dataclasses.replace(CASES[name], **fields)


REFUSALS: list[tuple[Case, Device, tuple[int, int], str]] = [
    (CASES["fp8"], Device("cuda", (8, 0)), (64, 64), "capability 8.9"),
    (CASES["fp8"], HERE, (64, 64), "capability 8.9"),
    (CASES["fp8"], Device("rocm"), (64, 64), "capability 8.9"),
    (CASES["fp8"], HOPPER, (64, 72), "multiples of 16 and 16"),
    (changed("fp8", dtype=torch.float32), HOPPER, (64, 64), "dtype=bfloat16"),
    (changed("fp8", spec=GridSpec("fp8", 8, 32)), HOPPER, (64, 64), "group_size=-1"),
    (changed("fp8", activation=None), HOPPER, (64, 64), "fp8 inputs"),
    (changed("fp8", spec=W8), HOPPER, (64, 64), "fp8 weights only"),
    (CASES["int8"], HERE, (64, 64), "capability 7.5"),
    (CASES["int8"], HOPPER, (62, 64), "multiples of 8 and 8"),
    (changed("int8", spec=GridSpec("int", 8, 32)), HOPPER, (64, 64), "group_size=-1"),
    (changed("int8", spec=GridSpec("int", 8, -1, False)), HOPPER, (64, 64), "symmetric=true"),
    (changed("int8", activation=None), HOPPER, (64, 64), "scheme=W8A8"),
    (changed("int8", activation=Activation(bits=16)), HOPPER, (64, 64), "at most 8 bits"),
    (CASES["int8_cpu"], HOPPER, (64, 64), "runs on a CPU only"),
    (CASES["int8_cpu"], Device("cpu", None, False), (64, 64), "AVX-512 VNNI"),
    (CASES["int4_g32"], Device("cuda", (7, 5)), (64, 64), "capability 8.0"),
    (CASES["int4_g32"], HOPPER, (60, 64), "multiples of 8 and 32"),
    (CASES["int4_g32"], HERE, (40, 64), "multiples of 16 and 32"),
    (changed("int4_g32", dtype=torch.float32), HERE, (64, 64), "dtype=bfloat16"),
    (changed("int4_g32", spec=GridSpec("int", 3, 32)), HOPPER, (64, 64), "4-bit integer"),
    (changed("int4_g32", spec=W4), HOPPER, (64, 64), "group_size=32 or 64"),
    (changed("int4_g32", activation=Activation()), HOPPER, (64, 64), "does not quantize inputs"),
    (CASES["2:4"], HERE, (64, 64), "capability 8.0"),
    (CASES["2:4"], HOPPER, (64, 96), "multiples of 64 and 64"),
    (changed("2:4", pattern="4:8"), HOPPER, (64, 64), "pattern=2:4"),
    (changed("2:4", spec=W4), HOPPER, (64, 64), "not quantized"),
    (changed("2:4", dtype=torch.float32), HOPPER, (64, 64), "dtype=bfloat16"),
]


@pytest.mark.parametrize(("case", "device", "shape", "why"), REFUSALS)
def test_refusals_say_what_is_missing(
    case: Case, device: Device, shape: tuple[int, int], why: str
) -> None:
    assert why in (case.kernel.refusal(case.facts(device, shape)) or "")


@pytest.mark.parametrize("name", [n for n in CASES if "cpu" not in n])
def test_hopper_is_served(name: str) -> None:
    assert CASES[name].kernel.refusal(CASES[name].facts(HOPPER)) is None


def test_shapes_that_are_not_refused_compute_on_a_cpu() -> None:
    for out, width in ((8, 24), (24, 8), (1, 3)):
        case = CASES["int8_cpu"]
        runnable(case)
        assert case.kernel.refusal(case.facts(HERE, (out, width))) is None
        packed, weight, _, _ = pack(case, out=out, width=width)
        rows = normal(5, width)
        assert distance(packed(rows), simulated(rows, weight, None, case.activation)) < 1e-5
        assert torch.equal(packed.weight, weight)
    for out, width in ((16, 32), (48, 96), (16, 160)):
        packed, weight, _, _ = pack(CASES["int4_g32"], out=out, width=width)
        rows = normal(5, width).to(BF16)
        assert distance(packed(rows), simulated(rows, weight, None, None)) < 1e-2
        assert torch.equal(packed.weight, weight)


def test_fp8_layer_runs_the_operator_of_the_device() -> None:
    packed, *_ = pack(CASES["fp8"])
    assert isinstance(packed, FP8Linear)
    assert packed.levels.dtype == torch.float8_e4m3fn
