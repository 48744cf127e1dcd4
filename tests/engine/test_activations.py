"""Quantized inputs of the layers of a live model, against a model whose layers do it by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lm_calib_plugin.engine import find_blocks, find_layers, weights_digest
from lm_calib_plugin.engine.activations import check_activations, install, quantizers, remove
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.errors import UnsupportedModelError, UserError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.quantization.activations import ActivationSpec
from tests.tiny import ARCHITECTURES, make_model, random_ids

DYNAMIC, STATIC = ActivationSpec(), ActivationSpec(dynamic=False)
DENSE = [n for n in ARCHITECTURES if n not in ("mixtral", "qwen2_moe", "qwen3_moe")]
IDS = torch.stack(random_ids([12, 12]))


def layers_of(model: nn.Module) -> list[TargetLayer]:
    return find_layers(find_blocks(model))[0]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def limits_of(layers: list[TargetLayer]) -> dict[str, float]:
    return {layer.name: 0.5 + 0.1 * i for i, layer in enumerate(layers)}


def naive_round(x: Tensor, bits: int, limit: float | None) -> Tensor:
    flat, half = x.reshape(-1, x.shape[-1]), (2**bits - 1) / 2
    out = torch.zeros_like(flat)
    for i, row in enumerate(flat):
        amax = row.abs().max() if limit is None else torch.tensor(limit)
        if amax > 0:
            # In float32: the last bit decides about the largest value.
            levels = torch.round(row / (amax / half)).clamp(-half - 0.5, half - 0.5)
            out[i] = levels * (amax / half)
    return out.reshape(x.shape).to(x.dtype)


def wrong_outputs(
    model: nn.Module, layers: list[TargetLayer], bits: int, limits: dict[str, float] | None
) -> list[str]:
    """Run the model; name layers whose output is not that of their input rounded by hand.

    Layer by layer, since the smallest difference in one layer moves values of the next ones
    across the middle between two levels.
    """
    raw: dict[str, Tensor] = {}
    output: dict[str, Tensor] = {}
    hooks = []
    for layer in layers:

        def before(_m: Any, args: Any, name: str = layer.name) -> None:
            raw[name] = args[0].clone()

        def after(_m: Any, _a: Any, made: Tensor, name: str = layer.name) -> None:
            output[name] = made.clone()

        hooks.append(layer.module.register_forward_pre_hook(before, prepend=True))
        hooks.append(layer.module.register_forward_hook(after))
    logits(model)
    for hook in hooks:
        hook.remove()
    wrong = []
    for layer in layers:
        x = naive_round(raw[layer.name], bits, None if limits is None else limits[layer.name])
        expected = functional.linear(x, layer.weight, layer.bias).float()
        dense = functional.linear(raw[layer.name], layer.weight, layer.bias).float()
        error = (output[layer.name].float() - expected).norm() / (expected - dense).norm()
        # One value of a layer at the middle between two levels makes 0.1.
        if not error < 0.3:
            wrong.append(f"{layer.name}: {error:g}")
    return wrong


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_every_layer_sees_its_input_rounded(name: str, static: bool) -> None:
    model = make_model(name)
    dense = logits(model)
    layers = layers_of(model)
    assert len(wrong_outputs(model, layers, 8, None)) == len(layers)
    limits = limits_of(layers) if static else None
    install(layers, STATIC if static else DYNAMIC, limits)
    assert not wrong_outputs(model, layers, 8, limits)
    assert not torch.allclose(logits(model), dense, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_removed_is_as_never_installed(name: str) -> None:
    model = make_model(name)
    before, digest = logits(model), weights_digest(model)
    names = [n for n, _ in model.named_modules()]
    install(layers_of(model), DYNAMIC)
    assert len([n for n, _ in model.named_modules()]) > len(names)
    remove(model)
    assert torch.equal(logits(model), before)
    assert [n for n, _ in model.named_modules()] == names
    assert weights_digest(model) == digest
    assert not any(
        m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules()
    )


def test_installing_again_replaces() -> None:
    model, once = make_model(), make_model()
    install(layers_of(model), ActivationSpec("int", 4))
    install(layers_of(model), DYNAMIC)
    install(layers_of(once), DYNAMIC)
    assert torch.equal(logits(model), logits(once))
    remove(model)
    assert torch.equal(logits(model), logits(make_model()))


@pytest.mark.parametrize("static", [False, True])
def test_a_shared_input_is_rounded_once(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    layers = layers_of(model)
    # As an observer would have it: layers with one input have one limit.
    sort = {"q": 1.0, "k": 1.0, "v": 1.0, "o": 2.0, "gate": 3.0, "up": 3.0, "down": 4.0}
    limits = {x.name: sort[x.name.rsplit(".", 1)[-1].removesuffix("_proj")] for x in layers}
    install(layers, STATIC if static else DYNAMIC, limits if static else None)
    rounded: list[int] = []
    real = ActivationSpec.round

    def counting(self: ActivationSpec, x: Tensor, limit: Tensor | None = None) -> Tensor:
        rounded.append(1)
        return real(self, x, limit)

    monkeypatch.setattr(ActivationSpec, "round", counting)
    logits(model)
    assert len(rounded) == 3 * 4


def test_nothing_is_stored_with_the_model(tmp_path: Path) -> None:
    model = make_model("gpt2")
    keys = list(model.state_dict())
    layers = layers_of(model)
    install(layers, STATIC, limits_of(layers))
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert torch.equal(logits(loaded), logits(make_model("gpt2")))


def test_copies_have_quantizers_of_their_own() -> None:
    model = make_model()
    layers = layers_of(model)
    install(layers, STATIC, limits_of(layers))
    logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    remove(model)
    assert len(quantizers(copied)) == len(layers)
    assert not quantizers(model)
    assert not set(map(id, quantizers(copied).values())) & set(map(id, quantizers(model).values()))
    assert not torch.equal(logits(copied), logits(model))


def test_limits_survive_casts_of_the_model() -> None:
    model = make_model()
    layers = layers_of(model)
    limits = limits_of(layers)
    install(layers, STATIC, limits)
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    for name, quantizer in quantizers(model).items():
        assert quantizer.limit is not None
        assert quantizer.limit.dtype == torch.float32
        assert float(quantizer.limit) == float(torch.tensor(limits[name]))
    remove(model)
    install(layers_of(model), ActivationSpec("int", 3, dynamic=False), limits)
    # Coarse levels: the error of bfloat16 itself is small beside that of rounding.
    assert not wrong_outputs(model, layers_of(model), 3, limits)


def test_generation_sees_quantized_inputs() -> None:
    model = make_model()
    dense = logits(model)
    install(layers_of(model), ActivationSpec("int", 3))
    made = model.generate(
        IDS,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        whole = model(input_ids=made.sequences[:, :-1], use_cache=False).logits
    stepwise = torch.stack(made.logits, dim=1)
    effect = (logits(model) - dense).norm() / len(dense[0]) * stepwise.shape[1]
    assert (whole[:, IDS.shape[1] - 1 :] - stepwise).norm() < 0.2 * effect


def test_a_run_in_between_leaves_quantizers_in_place() -> None:
    model = make_model()
    install(layers_of(model), DYNAMIC)
    before = logits(model)
    with left_as_found(model):
        model(input_ids=IDS)
    assert torch.equal(logits(model), before)


def test_inputs_given_by_name_are_rounded() -> None:
    block = nn.ModuleList([nn.Linear(8, 4)])
    linear = block[0]
    assert isinstance(linear, nn.Linear)
    install([TargetLayer("0.x", linear, "weight", 0)], ActivationSpec("int", 3))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(input=x), linear(x))
    assert not torch.equal(linear(x), functional.linear(x, linear.weight, linear.bias))


def test_digest_tells_what_is_rounded_and_how() -> None:
    found = set()
    for spec, factor in ((DYNAMIC, 0), (ActivationSpec("int", 4), 0), (STATIC, 1), (STATIC, 1.001)):
        model = make_model()
        layers = layers_of(model)
        limits = {n: v * factor for n, v in limits_of(layers).items()} if factor else None
        install(layers, spec, limits)
        found.add(weights_digest(model))
    model = make_model()
    install(layers_of(model)[1:], DYNAMIC)
    found |= {weights_digest(model), weights_digest(make_model())}
    assert len(found) == 6


def test_fused_experts_are_refused_before_anything_is_installed() -> None:
    model = make_model("mixtral")
    layers = layers_of(model)
    for refuse in (check_activations, lambda x: install(x, DYNAMIC)):
        with pytest.raises(UserError, match=r"mlp\.experts\.0\.gate_up_proj.*ignore=\*experts\*"):
            refuse(layers)
    assert not quantizers(model)
    rest = [layer for layer in layers if layer.expert is None]
    install(rest, DYNAMIC)
    assert len(quantizers(model)) == len(rest)


def test_layers_that_are_never_called_are_refused() -> None:
    attention = nn.MultiheadAttention(8, 2)
    layer = TargetLayer("0.attn.out_proj", attention.out_proj, "weight", 0)
    with pytest.raises(UnsupportedModelError, match=r"ignore=0\.attn\.out_proj"):
        check_activations([layer])


def test_widths_and_limits_are_checked() -> None:
    layers = layers_of(make_model(intermediate_size=40))
    with pytest.raises(UserError, match=r"down_proj has 40 inputs"):
        check_activations(layers, ActivationSpec("nvfp4"))
    with pytest.raises(ValueError, match="limits"):
        install(layers, STATIC)
    with pytest.raises(ValueError, match="limits"):
        install(layers, DYNAMIC, limits_of(layers))
