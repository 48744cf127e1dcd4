"""Tensors and settings of quantized layers, against the library that reads them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lm_calib_plugin.engine.activations import quantizers
from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.execution import Activation, Int8Linear
from lm_calib_plugin.export.layer_groups import patterns
from lm_calib_plugin.export.quantized import (
    QuantizedLayer,
    flattened_inputs,
    layer_tensors,
    module_refusal,
    packs_weights,
    quantization_config,
    refusal,
)
from lm_calib_plugin.quantization.activations import ActivationQuantizer, ActivationSpec
from lm_calib_plugin.quantization.grids import GridSpec, RealZeroGrid
from tests.tiny import make_model

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INT8, FP8 = ActivationSpec(), ActivationSpec("fp8")
INTS = [(GridSpec("int", bits, size), None) for bits in range(2, 9) for size in (16, -1)]
INTS += [(GridSpec("int", bits, size), INT8) for bits, size in ((8, -1), (4, 16), (4, -1))]
FLOATS = [(GridSpec("fp8", 8, size), act) for size in (16, -1) for act in (FP8, None)]
BLOCKS = [(GridSpec("nvfp4", 4, 16), None), (GridSpec("mxfp4", 4, 32), None)]


def layer(
    spec: GridSpec | None,
    act: ActivationSpec | None = None,
    dtype: torch.dtype = F32,
    name: str = "model.layers.0.mlp.up_proj",
    shape: tuple[int, int] = (24, 160),
    limit: float = 3.3,
) -> QuantizedLayer:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    # Rows from tiny to large, and one without anything.
    weight *= torch.logspace(-4, 2, shape[0])[:, None]
    weight[3] = 0
    weight = weight.to(dtype).float()
    grid = None if spec is None else spec.fit(weight, dtype)
    evaluated = (weight if grid is None else grid.round(weight)).to(dtype) + 0
    if act is not None and not act.dynamic:
        limit = act.storable(limit, dtype)
    quantizer = act and ActivationQuantizer(act, None if act.dynamic else limit)
    return QuantizedLayer(name, evaluated, grid, quantizer)


def scheme_of(one: QuantizedLayer) -> Any:
    from compressed_tensors.quantization import QuantizationScheme

    group = quantization_config([one], [])["config_groups"]["group_0"]
    return QuantizationScheme.model_validate(group)


def compressor_of(scheme: Any) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(str(scheme.format))


# --- tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("spec", "act"), [*INTS, *FLOATS, *BLOCKS], ids=str)
def test_tensors_are_those_of_the_library_and_give_the_weight_back(
    spec: GridSpec, act: ActivationSpec | None, dtype: torch.dtype
) -> None:
    if refusal(spec, act, dtype) is not None:
        return
    one = layer(spec, act, dtype)
    found, scheme = layer_tensors(one), scheme_of(one)
    assert one.grid is not None
    # In float32: in bfloat16 the library itself misses levels of 8 bits.
    given = {"weight": one.weight.float(), "weight_scale": one.grid.scale}
    if spec.number == "nvfp4":
        grid: Any = one.grid
        given["weight_scale"] = grid.stored_scale
        given["weight_global_scale"] = grid.factor.reshape(1)
    wanted = compressor_of(scheme).compress(given, scheme)
    assert found.keys() == wanted.keys()
    if spec.number in ("int", "fp8"):
        wanted["weight_scale"] = wanted["weight_scale"].to(dtype)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(_bytes(found[name]), _bytes(tensor)), name
    again = compressor_of(scheme).decompress(found, scheme)["weight"]
    assert again.dtype == dtype
    assert torch.equal(again, one.weight)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_hold_the_bits_of_the_levels_one_after_the_other(bits: int) -> None:
    """Levels plus 2^(bits - 1), lowest bit first, without gaps, over the ends of words."""
    one = layer(GridSpec("int", bits, -1), shape=(5, 45))
    assert one.grid is not None
    levels = (one.weight / one.grid.scale).round().long() + 2 ** (bits - 1)
    found = layer_tensors(one)["weight_packed"]
    for row, words in zip(levels.tolist(), found.tolist(), strict=True):
        number = sum(level << (bits * i) for i, level in enumerate(row))
        assert number == sum((word % 2**32) << (32 * i) for i, word in enumerate(words))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("number", ["int", "fp8"])
def test_static_scales_are_stored_as_they_are_evaluated(number: str, dtype: torch.dtype) -> None:
    act = ActivationSpec(number, dynamic=False)
    one = layer(GridSpec(number, 8, -1), act, dtype)
    stored = layer_tensors(one)["input_scale"]
    assert one.activation is not None
    assert stored.shape == (1,)
    assert stored.dtype == dtype
    assert float(stored) == float(one.activation.scale)


def test_rounded_inputs_alone_leave_the_weight() -> None:
    one = layer(None, ActivationSpec(dynamic=False))
    assert set(layer_tensors(one)) == {"weight", "input_scale"}
    assert torch.equal(layer_tensors(one)["weight"], one.weight)


def test_the_factor_of_nvfp4_inputs_is_stored() -> None:
    one = layer(GridSpec("nvfp4", 4, 16), ActivationSpec("nvfp4", dynamic=False), BF16, limit=2.5)
    assert float(layer_tensors(one)["input_global_scale"]) == pytest.approx(448 * 6 / 2.5)


def test_what_is_no_level_or_no_scale_of_the_dtype_is_not_stored() -> None:
    one = layer(GridSpec("int", 4, 16))
    moved = one.weight.clone()
    moved[5, 7] += 0.3 * float(one.grid.scale[5, 0])  # type: ignore[union-attr]
    with pytest.raises(CalibError, match="up_proj can not be stored.* 1 of 3840 weights"):
        layer_tensors(dataclasses.replace(one, weight=moved))
    beyond = one.weight.clone()
    beyond[5, :16] = 8 * one.grid.scale[5, 0]  # type: ignore[union-attr]
    with pytest.raises(CalibError, match="beyond 4 bits"):
        layer_tensors(dataclasses.replace(one, weight=beyond))
    with pytest.raises(CalibError, match="no bfloat16 number"):
        layer_tensors(dataclasses.replace(one, weight=one.weight.bfloat16()))
    static = ActivationQuantizer(ActivationSpec(dynamic=False), 0.1)
    with pytest.raises(CalibError, match="no bfloat16 number"):
        layer_tensors(QuantizedLayer("x", torch.zeros(2, 2, dtype=BF16), None, static))
    for fitted in (layer(GridSpec("int", 4, 16, False)),):
        with pytest.raises(CalibError, match="zero points"):
            layer_tensors(fitted)
        grid = RealZeroGrid.of(fitted.grid, fitted.grid.zero + 0.5)  # type: ignore
        with pytest.raises(CalibError, match="zero points"):
            layer_tensors(dataclasses.replace(fitted, grid=grid))


# --- inputs -----------------------------------------------------------------------------------


def tokens(dtype: torch.dtype = F32) -> Tensor:
    """Inputs ``[batch, tokens, in]``: extremes of both signs, a token of zeros, tiny groups."""
    x = torch.randn(7, 300, 64, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-3, 3, 300)[:, None]
    x[0, 0] = 0
    x[1, :, 32:] *= 1e-6
    return x.to(dtype)


def by_the_library(one: QuantizedLayer, x: Tensor) -> Tensor:
    """Round inputs as a loaded layer does."""
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    module: Any = nn.Linear(2, 2)
    for name, tensor in layer_tensors(one).items():
        if name.startswith("input_"):
            module.register_buffer(name, tensor)
    module.quantization_status = QuantizationStatus.DECOMPRESSED
    return forward_quantize(module, x, "input", scheme_of(one).input_activations)


SPECS = [ActivationSpec("int", bits) for bits in range(2, 9)] + [FP8]
SPECS += [ActivationSpec("int", bits, False) for bits in (4, 8)]
SPECS += [ActivationSpec("fp8", dynamic=False)]
GROUPED = [ActivationSpec("mxfp4"), ActivationSpec("nvfp4", dynamic=False)]
SAME = [(spec, F32) for spec in SPECS + GROUPED] + [(spec, BF16) for spec in GROUPED]


@pytest.mark.parametrize(("spec", "dtype"), SAME, ids=str)
def test_inputs_are_rounded_as_by_the_loader(spec: ActivationSpec, dtype: torch.dtype) -> None:
    one, x = layer(None, spec, dtype, limit=57.3), tokens(dtype)
    assert one.activation is not None
    assert torch.equal(one.activation(x), by_the_library(one, x))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.describe())
def test_inputs_of_short_dtypes_are_rounded_to_a_neighbor(
    spec: ActivationSpec, dtype: torch.dtype
) -> None:
    """The loader computes in the dtype of the model, we in float32: one level apart at most."""
    one, x = layer(None, spec, dtype, limit=57.3), tokens(dtype)
    assert one.activation is not None
    ours, theirs = one.activation(x).float(), by_the_library(one, x).float()
    limit = x.float().abs().amax(-1, keepdim=True) if spec.dynamic else one.activation.limit
    scale = spec.scale(limit)  # type: ignore[arg-type]
    # e4m3 values are at most an eighth apart, and subnormal ones 2^-9 times the scale.
    step = scale if spec.number == "int" else torch.maximum(ours.abs() / 8, scale * 2.0**-9)
    room = 4 * torch.finfo(dtype).eps * ours.abs() + torch.finfo(dtype).tiny
    assert ((ours - theirs).abs() <= 1.01 * step + room).all()


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "act", "dtype", "words"),
    [
        (GridSpec("int", 4, 16, False), None, None, "compressed-tensors 0.20 packs zero points"),
        (GridSpec("int", 12, 16), None, None, "up to 8 bits, not 12"),
        (GridSpec("nvfp4", 4, 16), None, F32, "bfloat16 of nvfp4 weights in a float32 model"),
        (GridSpec("mxfp4", 4, 32), None, F16, "dtype=bfloat16"),
        (GridSpec("nvfp4", 4, 16), ActivationSpec("nvfp4"), None, "one for each token"),
        (GridSpec("int", 4, 16), None, torch.float64, "in float64, we do in float32"),
    ],
)
def test_what_would_not_come_back_is_refused(
    spec: GridSpec, act: ActivationSpec | None, dtype: torch.dtype | None, words: str
) -> None:
    assert words in str(refusal(spec, act, dtype))


@pytest.mark.parametrize(("spec", "act"), [*INTS, *FLOATS, *BLOCKS, (None, INT8)], ids=str)
def test_what_comes_back_is_not_refused(spec: GridSpec | None, act: ActivationSpec | None) -> None:
    assert refusal(spec, act) is None
    assert refusal(spec, act, BF16) is None


def test_modules_that_the_loader_does_not_quantize_are_refused() -> None:
    assert module_refusal(nn.Linear(2, 2)) is None
    assert "this is Conv1D" in str(module_refusal(Conv1D(2, 2)))
    assert "Experts" in str(module_refusal(make_model("mixtral").model.layers[0].mlp.experts))
    own = NonDynamicallyQuantizableLinear(2, 2)
    assert "weight of NonDynamicallyQuantizableLinear" in str(module_refusal(own))
    assert module_refusal(own, packs=False) is None
    int4, int8 = GridSpec("int", 4, 16), GridSpec("int", 8, -1)
    assert packs_weights(int4, None)
    assert not packs_weights(int8, INT8)
    assert not packs_weights(GridSpec("fp8", 8, -1), FP8)
    assert packs_weights(GridSpec("mxfp4", 4, 32), ActivationSpec("mxfp4"))
    assert not packs_weights(None, INT8)


def test_packed_layers_are_what_they_replaced() -> None:
    one = layer(GridSpec("int", 8, -1))
    packed = Int8Linear.from_layer(one.weight, one.grid, None, Activation())
    packed.replaced = (nn.Linear(2, 2),)
    assert module_refusal(packed) is None
    packed.replaced = (Conv1D(2, 2),)
    assert "Conv1D" in str(module_refusal(packed))


@pytest.mark.parametrize(
    ("name", "flat"),
    [
        ("llama", []),
        ("bloom", []),
        ("opt", ["fc1", "fc2"]),
        ("qwen2_moe", ["expert"]),
    ],
)
def test_inputs_without_sequences_are_found(name: str, flat: list[str]) -> None:
    model = make_model(name)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = flattened_inputs(model, names)
    assert bool(found) == bool(flat)
    assert all(any(part in n for part in flat) for n in found)
    assert not quantizers(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


# --- settings ---------------------------------------------------------------------------------


def named(name: str, spec: GridSpec, width: int = 160) -> QuantizedLayer:
    return layer(spec, name=name, shape=(8, width))


def matched(settings: dict[str, Any], name: str) -> str | None:
    """Return the group that the loader finds for a linear layer."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match, match_targets

    config, module = QuantizationConfig.model_validate(settings), nn.Linear(2, 2)
    of = {t: group for group, scheme in config.config_groups.items() for t in scheme.targets}
    if not is_match(name, module, list(of), config.ignore):
        return None
    return of[match_targets(name, module, of)[0]]


def test_one_kind_is_all_linear_layers_but_those_named() -> None:
    layers = [named(f"model.layers.{i}.mlp.up_proj", GridSpec("int", 4, 16)) for i in range(3)]
    settings = quantization_config(layers, ["lm_head", "model.layers.1.mlp.gate"])
    assert settings["format"] == "pack-quantized"
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["quantization_status"] == "compressed"
    assert settings["ignore"] == ["lm_head", "model.layers.1.mlp.gate"]
    assert list(settings["config_groups"]) == ["group_0"]
    group = settings["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["input_activations"] is None
    assert group["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 16,
        "dynamic": False,
    }


def test_every_layer_finds_its_own_kind_and_no_other_layer_any() -> None:
    w4, w8, w3 = GridSpec("int", 4, 16), GridSpec("int", 8, -1), GridSpec("int", 3, 16)
    kinds = {"q_proj": w4, "k_proj": w8, "up_proj": w3}
    names = {f"m.layers.{i}.{n}": spec for i in range(12) for n, spec in kinds.items()}
    names["m.layers.1.k_proj"] = w4
    others = ["m.layers.10.q_proj", "m.layers.1.up_proj_b", "lm_head", "xm.layers.2.up_proj"]
    for other in others:
        names.pop(other, None)
    settings = quantization_config([named(n, s) for n, s in names.items()], others)
    targets = [t for g in settings["config_groups"].values() for t in g["targets"]]
    # Only where all blocks agree does one expression stand for all.
    assert [t for t in targets if t.startswith("re:")] == [r"re:^m\.layers\.\d+\.up_proj$"]
    assert "Linear" not in targets
    for name, spec in names.items():
        group = settings["config_groups"][str(matched(settings, name))]
        assert group["weights"]["num_bits"] == spec.bits, name
    open_to_all = {**settings, "ignore": []}
    for name in [*others, "m.layers.11.q_proj.q_proj", "m.layers.110.k_proj", "m.layers.3.q_projx"]:
        assert matched(open_to_all, name) is None, name
    assert settings["format"] == "pack-quantized"


def test_kinds_of_several_formats_are_mixed() -> None:
    layers = [named("a.0.x", GridSpec("int", 4, 16)), named("a.0.y", GridSpec("fp8", 8, -1))]
    settings = quantization_config(layers, [])
    assert settings["format"] == "mixed-precision"
    formats = [group["format"] for group in settings["config_groups"].values()]
    assert formats == ["pack-quantized", "float-quantized"]


def test_a_layer_as_wide_as_a_group_is_of_the_kind_of_its_neighbors() -> None:
    spec = GridSpec("int", 4, 16)
    settings = quantization_config([named("a.0.x", spec), named("a.0.y", spec, 16)], [])
    assert len(settings["config_groups"]) == 1
    alone = quantization_config([named("a.0.y", spec, 16)], [])["config_groups"]["group_0"]
    assert alone["weights"]["strategy"] == "channel"
    assert alone["weights"]["group_size"] is None


def test_names_outside_of_blocks_stay_names() -> None:
    assert patterns([["lm_head"], ["a.0.x", "a.1.x"]], []) == [["lm_head"], [r"re:^a\.\d+\.x$"]]
    assert patterns([["a.0.x"], ["a.0.y"]], ["a.1.x"]) == [["a.0.x"], [r"re:^a\.\d+\.y$"]]
