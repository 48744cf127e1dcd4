"""The contract of the kernels on a CUDA device; none of it runs without one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lm_calib_plugin.execution import Device, PackLayer, pack, unpack
from lm_calib_plugin.execution.base import simulated
from lm_calib_plugin.execution.choose import TOLERANCE
from tests.execution.cases import CASES, Case, normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = [name for name in CASES if "cpu" not in name]
OUT, WIDTH = 256, 512


def layer_of(name: str, bias: bool = False) -> tuple[Case, nn.Linear, PackLayer]:
    """A simulated layer on the device, or a skip with the kernel's own refusal."""
    case = CASES[name]
    why = case.kernel.refusal(case.facts(Device.of("cuda"), (OUT, WIDTH)))
    if why is not None:
        pytest.skip(why)
    weight, grid = case.weight(OUT, WIDTH)
    linear = nn.Linear(WIDTH, OUT, bias=bias, device="cuda", dtype=case.dtype)
    linear.weight.data.copy_(weight)
    return case, linear, PackLayer("0", case.spec, grid, case.activation, case.pattern)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 17, 512])
@torch.no_grad()
def test_kernel_is_the_simulated_layer_and_its_emulation(
    name: str, bias: bool, tokens: int
) -> None:
    case, linear, layer = layer_of(name, bias)
    rows = case.inputs(tokens + 1, WIDTH)[1:].cuda()
    wanted = simulated(rows, linear.weight, linear.bias, case.activation)
    grid, weight, added = layer.grid, linear.weight.cpu(), linear.bias
    added = None if added is None else added.cpu()
    emulated = case.kernel.emulate(rows.cpu(), weight, grid, added, case.activation)
    packed = case.kernel.from_layer(linear.weight, grid, linear.bias, case.activation)
    found = packed(rows)
    assert found.dtype == case.dtype
    for other in (wanted.cpu(), emulated):
        distance = (found.cpu().double() - other.double()).norm() / other.double().norm()
        assert float(distance) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", NAMES)
def test_packing_frees_memory_and_unpacking_restores_every_bit(name: str) -> None:
    _, linear, layer = layer_of(name)
    weight = linear.weight.detach().clone()
    model = nn.Sequential(linear)
    report = pack(model, [layer], tokens=64, force=True)
    assert report.layers[0].kernel == CASES[name].kernel.kernel, report.table()
    assert not report.warnings, report.warnings
    assert report.summary()["weight_bytes_after"] < 0.7 * report.summary()["weight_bytes_before"]
    assert unpack(model) == 1
    assert torch.equal(linear.weight, weight)


@pytest.mark.parametrize("name", NAMES)
def test_the_clock_decides(name: str) -> None:
    _, linear, layer = layer_of(name)
    report = pack(nn.Sequential(linear), [layer], tokens=64)
    (found,) = report.layers
    assert found.race is not None, report.table()
    assert (found.kernel is not None) == (found.race.ratio > 1)


def test_probe_rows_on_the_device() -> None:
    _, linear, layer = layer_of("int8")
    rows = normal(8, WIDTH).cuda()
    given = PackLayer("0", layer.spec, layer.grid, layer.activation, probe=rows)
    report = pack(nn.Sequential(linear), [given], force=True)
    assert report.error < TOLERANCE[torch.float32]
