"""Weights on a coarse grid are told from all others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_calib_plugin import Recipe, compress
from lm_calib_plugin.quantization.coarse import coarse_bits
from tests.engine.test_walk import QUIET, calibration
from tests.tiny import make_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(rows: int, width: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def on_grid(weight: Tensor, bits: int, size: int, symmetric: bool) -> Tensor:
    """Bring every group to its levels, from the definition."""
    groups = weight.double().reshape(-1, size)
    if symmetric:
        scale = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
        level = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (level * scale).reshape(weight.shape).float()
    low = groups.amin(1, keepdim=True).clamp(max=0)
    scale = (groups.amax(1, keepdim=True).clamp(min=0) - low) / (2**bits - 1)
    zero = (-low / scale).round()
    level = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
    return ((level - zero) * scale).reshape(weight.shape).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, 64, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grids_are_found(bits: int, size: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = on_grid(normal(96, 256), bits, size, symmetric).to(dtype)
    assert coarse_bits(weight) == bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_with_one_scale_a_row_are_found(dtype: torch.dtype) -> None:
    assert coarse_bits(on_grid(normal(32, 1024), 8, 1024, True).to(dtype)) == 8


def test_pruned_grids_are_found() -> None:
    weight = on_grid(normal(96, 256), 4, 128, True)
    weight[:, ::2] = 0
    assert coarse_bits(weight) == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 96, 128, 192, 384, 1024, 4096])
def test_plain_weights_lie_on_none(width: int, dtype: torch.dtype) -> None:
    weight = normal(64, width, seed=width)
    assert coarse_bits(weight.to(dtype)) is None
    # A few huge ones, as in real models.
    weight[::7, ::13] *= 20
    assert coarse_bits(weight.to(dtype)) is None


def pruned(weight: Tensor, kind: str) -> Tensor:
    if kind == "2:4":
        groups = weight.abs().reshape(-1, 4)
        keep = torch.zeros_like(groups).scatter_(1, groups.topk(2, dim=1).indices, 1.0)
        return weight * keep.reshape(weight.shape)
    count = int(weight.shape[1] * float(kind))
    gone = weight.abs().argsort(dim=1)[:, :count]
    return weight.scatter(1, gone, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 96, 192, 768, 4096])
@pytest.mark.parametrize("kind", ["0.5", "0.9", "0.95", "2:4"])
def test_pruned_weights_lie_on_none(kind: str, width: int, dtype: torch.dtype) -> None:
    assert coarse_bits(pruned(normal(32, width, seed=width), kind).to(dtype)) is None


@pytest.mark.parametrize("shape", [(1, 64), (5, 7), (3, 1), (64, 256)])
def test_zeros_are_no_grid(shape: tuple[int, int]) -> None:
    assert coarse_bits(torch.zeros(shape)) is None
    one = torch.zeros(shape)
    one[0, 0] = 1.0
    assert coarse_bits(one) is None


def warned(model: Any, **options: Any) -> bool:
    report = compress(model, None, Recipe(**options), QUIET, calibration())
    return any("lie on a grid" in warning for warning in report.warnings)


def dequantized(bits: int, dtype: torch.dtype = torch.float32) -> Any:
    model = make_model(hidden_size=64, intermediate_size=96).to(dtype)
    for block in model.model.layers:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                rounded = on_grid(module.weight.data.float(), bits, 32, True)
                module.weight.data = rounded.to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_quantization_is_warned_of_where_it_is_no_coarser(dtype: torch.dtype) -> None:
    model = dequantized(4, dtype)
    for bits, wanted in ((3, False), (4, True), (8, True)):
        assert warned(copy.deepcopy(model), method="rtn", bits=bits, group_size=32) == wanted
    assert warned(copy.deepcopy(model), method="gptq", bits=4, group_size=32)
    assert not warned(copy.deepcopy(model), method="wanda", sparsity=0.5)
    plain = make_model(hidden_size=64, intermediate_size=96).to(dtype)
    assert not warned(plain, method="rtn", bits=8, group_size=32)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "smoothquant", "hqq"])
def test_layers_of_zeros_stay_zero(method: str) -> None:
    model = make_model()
    for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.gate_proj"):
        model.model.layers[1].get_submodule(name).weight.data.zero_()
    options = {"symmetric": False} if method == "hqq" else {}
    assert not warned(model, method=method, **({"group_size": 8} | options))
    for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.gate_proj"):
        assert not model.model.layers[1].get_submodule(name).weight.any()
