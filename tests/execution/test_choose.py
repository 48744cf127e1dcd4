"""What is packed and what stays dense, on whole models; the slow and the wrong kernel are loud."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lm_calib_plugin.execution import (
    Activation,
    Device,
    Int4WeightOnly,
    Int8CPULinear,
    Int8Linear,
    PackedLinear,
    PackLayer,
    Race,
    pack,
    unpack,
)
from lm_calib_plugin.execution.choose import race
from lm_calib_plugin.execution.facts import Facts
from lm_calib_plugin.execution.levels import simulate_rows
from lm_calib_plugin.quantization.grids import GridSpec
from tests.execution.cases import CASES, W8
from tests.tiny import make_model, random_ids

NOT_HERE = Int8CPULinear.refusal(CASES["int8_cpu"].facts(Device.of("cpu")))
vnni = pytest.mark.skipif(NOT_HERE is not None, reason=str(NOT_HERE))
IDS = torch.stack(random_ids([12, 12]))


class AnyInt8(Int8Linear):
    """The CUDA kernel, on whatever there is: the operator exists on CPUs."""

    kernel = "any_int8"

    @staticmethod
    def refusal(facts: Facts) -> str | None:
        """Serve what the CUDA kernel serves on a CUDA device, shapes aside."""
        return None if facts.number == "int" and facts.per_row else "needs one scale per row"


class Wrong(AnyInt8):
    """A kernel with a mistake of 1 %."""

    kernel = "wrong"

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply, a little too much."""
        return super().multiply(rows) * 1.01


class Broken(AnyInt8):
    """A kernel that the library refuses to run."""

    kernel = "broken"

    def multiply(self, rows: Tensor) -> Tensor:
        """Fail as operators fail."""
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more lines")


def ratio(value: float) -> Callable[..., Race]:
    return lambda dense, packed, x: Race(value, 1.0)


def quantize(
    name: str = "llama", spec: GridSpec = W8, activation: Activation | None = None, **changes: Any
) -> tuple[Any, list[PackLayer]]:
    """A simulated model: weights on their grids, inputs rounded by hooks."""
    model = make_model(name, **changes)
    activation = activation or Activation()
    found = []

    def hook(module: nn.Module, args: tuple[Tensor]) -> Any:
        x = args[0]
        return (simulate_rows(x.reshape(-1, x.shape[-1]), activation).reshape(x.shape),)

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and name != "lm_head":
            stored = module.weight.data
            stored = stored.t() if isinstance(module, Conv1D) else stored
            weight = stored.float().contiguous()
            grid = spec.fit(weight, stored.dtype)
            stored.copy_(grid.round(weight))
            found.append(PackLayer(name, spec, grid, activation))
            module.register_forward_pre_hook(hook)
    return model, found


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def packed_modules(model: nn.Module) -> int:
    return sum(isinstance(m, PackedLinear) for m in model.modules())


@vnni
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gpt2", "falcon", "bloom", "phi3"])
def test_packed_model_is_the_simulated_model(name: str) -> None:
    model, layers = quantize(name)
    before, wanted = parameters(model), logits(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = pack(model, layers, force=True)
    assert [layer.name for layer in report.packed] == [layer.name for layer in layers]
    assert report.error < 1e-6
    assert not report.warnings
    # An input just beside the middle of two levels may fall to the other side.
    assert float((logits(model) - wanted).norm() / wanted.norm()) < 0.01
    again = model.state_dict()
    assert same(again, state)
    assert unpack(model) == len(layers)
    assert same(parameters(model), before)
    assert torch.equal(logits(model), wanted)


@vnni
def test_generation_and_untied_heads() -> None:
    model, layers = quantize("llama")
    head = model.get_output_embeddings()
    grid = W8.fit(head.weight.data)
    head.weight.data.copy_(grid.round(head.weight.data))
    report = pack(model, [*layers, PackLayer("lm_head", W8, grid, Activation())], force=True)
    assert report.layers[-1].kernel == "int8_cpu"
    assert model.get_output_embeddings().weight.shape == head_shape(model)
    out = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 16)


def head_shape(model: Any) -> tuple[int, int]:
    return model.config.vocab_size, model.config.hidden_size


def test_memory_is_freed_for_whoever_refers_to_it() -> None:
    model, layers = quantize()
    modules = [model.get_submodule(layer.name) for layer in layers]
    report = pack(model, layers, force=True, kernels=[AnyInt8])
    assert all(module.weight.numel() == 0 for module in modules)
    before = report.summary()["weight_bytes_before"]
    after = report.summary()["weight_bytes_after"]
    numbers = sum(layer.bytes_before for layer in report.layers) // 4
    rows = sum(m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    assert (before, after) == (4 * numbers, numbers + 4 * rows)
    assert not [n for n, _ in model.named_parameters() if n in {f"{x.name}.weight" for x in layers}]


def test_a_slower_kernel_leaves_everything_as_it_was_and_says_so() -> None:
    model, layers = quantize()
    before, wanted = parameters(model), logits(model)
    report = pack(model, layers, tokens=77, kernels=[AnyInt8], racer=ratio(0.4))
    assert not packed_modules(model)
    assert same(parameters(model), before)
    assert torch.equal(logits(model), wanted)
    (warning,) = report.warnings
    assert "none of 21 layers" in warning
    assert "any_int8 is slower than dense at 77 tokens" in warning
    assert "execution=simulated" in warning
    assert report.summary()["execution"] == "simulated"
    assert report.speed_ratio == 1
    row = report.table()[layers[0].name]
    assert row["speed_ratio"] == 0.4
    assert "0.40 times its speed" in row["reason"]
    assert row["weight_bytes_after"] == row["weight_bytes_before"]


def test_force_packs_what_is_slower() -> None:
    model, layers = quantize()
    report = pack(model, layers, kernels=[AnyInt8], racer=ratio(0.4), force=True)
    assert packed_modules(model) == 21
    assert not report.warnings
    assert report.speed_ratio == pytest.approx(0.4)


@pytest.mark.parametrize("force", [False, True])
def test_a_wrong_kernel_is_never_used(force: bool) -> None:
    model, layers = quantize()
    report = pack(model, layers, kernels=[Wrong], racer=ratio(9), force=force)
    assert not packed_modules(model)
    assert "wrong differs from the simulated layer" in report.warnings[0]
    assert "relative error 0.01, allowed 0.0001" in report.table()[layers[0].name]["reason"]


def test_a_kernel_that_fails_is_not_used_and_the_next_one_is() -> None:
    model, layers = quantize()
    report = pack(model, layers, kernels=[Broken], racer=ratio(9))
    assert not packed_modules(model)
    assert "broken failed" in report.warnings[0]
    row = report.table()[layers[0].name]
    assert "RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED" in row["reason"]
    assert "more lines" not in row["reason"]
    report = pack(model, layers, kernels=[Broken, Wrong, AnyInt8], racer=ratio(9))
    assert report.summary()["kernels"] == {"any_int8": 21}


def test_the_faster_of_two_right_kernels_is_taken() -> None:
    class Twin(AnyInt8):
        kernel = "twin"

    def racer(dense: Any, packed: PackedLinear, x: Tensor) -> Race:
        return Race(3.0 if packed.kernel == "twin" else 2.0, 1.0)

    for order in ([AnyInt8, Twin], [Twin, AnyInt8]):
        model, layers = quantize()
        assert pack(model, layers, kernels=order, racer=racer).summary()["kernels"] == {"twin": 21}


def test_each_shape_is_timed_once_with_the_tokens_of_the_evaluation_and_with_one() -> None:
    model, layers = quantize()
    seen = []

    def racer(dense: Any, packed: PackedLinear, x: Tensor) -> Race:
        seen.append((packed.out_features, packed.in_features, len(x)))
        assert torch.allclose(dense(x), x @ packed.weight.t(), atol=1e-5)
        # Layers that read the wide hidden state are slower.
        return Race(0.5 if packed.in_features == 48 else 2.0, 1.0)

    report = pack(model, layers, tokens=24, kernels=[AnyInt8], racer=racer)
    shapes = {(m.out_features, m.in_features) for m in make_linear()}
    assert sorted(seen) == sorted((*s, t) for s in shapes for t in (24, 1))
    assert {layer.name.rsplit(".", 1)[1] for layer in report.dense} == {"down_proj"}
    assert "3 of 21 layers stay dense" in report.warnings[0]
    assert report.speed_ratio == pytest.approx((18 * 2 + 3 * 0.5) / (18 + 3 * 0.5))


def make_linear() -> list[nn.Linear]:
    block = make_model().model.layers[0]
    return [m for m in block.modules() if isinstance(m, nn.Linear)]


def test_no_kernel_for_a_layer_is_a_reason() -> None:
    model, layers = quantize(spec=GridSpec("int", 8, 16))
    report = pack(model, layers)
    assert not packed_modules(model)
    assert all("needs one scale per output row" in layer.reason for layer in report.layers)


def test_weights_that_moved_off_their_grid_stay_dense() -> None:
    model, layers = quantize()
    model.get_submodule(layers[0].name).weight.data[0, 0] *= 1.003
    report = pack(model, layers, kernels=[AnyInt8], racer=ratio(2))
    assert [layer.name for layer in report.dense] == [layers[0].name]
    assert "any_int8 cannot hold it" in report.dense[0].reason
    assert "1 of 1024 weights" in report.dense[0].detail


def test_experts_embeddings_and_shared_weights_stay_dense() -> None:
    model, layers = quantize("mixtral")
    expert = PackLayer("model.layers.0.mlp.experts.0.gate_up_proj", W8)
    report = pack(model, [*layers, expert], kernels=[AnyInt8], racer=ratio(2))
    assert {layer.name.rsplit(".", 1)[1] for layer in report.packed} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert "fused experts" in report.warnings[0]
    model, _ = quantize("llama_tied")
    names = ("lm_head", "model.embed_tokens", "model.norm")
    report = pack(model, [PackLayer(name, W8, None) for name in names], kernels=[AnyInt8])
    assert [layer.reason for layer in report.layers] == [
        "shares its weight with another module",
        "is a Embedding, not a linear layer",
        "is not a linear layer",
    ]


def test_packing_twice_changes_nothing() -> None:
    model, layers = quantize()
    pack(model, layers, kernels=[AnyInt8], racer=ratio(2))
    report = pack(model, layers, kernels=[AnyInt8], racer=ratio(2))
    assert len(report.packed) == 21
    assert packed_modules(model) == unpack(model) == 21
    assert unpack(model) == 0


def test_the_simulated_models_own_rounding_is_what_counts() -> None:
    model, layers = quantize()
    other = [PackLayer(x.name, x.spec, x.grid, x.activation, quantize=lambda r: r) for x in layers]
    report = pack(model, other, kernels=[AnyInt8], racer=ratio(2))
    assert not report.packed
    assert "differs from the simulated layer" in report.warnings[0]


def test_given_rows_are_compared_on() -> None:
    model, layers = quantize(activation=Activation("int", 8, False, 0.01))
    first = layers[0]
    rows = torch.zeros(3, 32)
    rows[0] = 1
    given = PackLayer(first.name, first.spec, first.grid, first.activation, probe=rows)
    seen = []

    class Watching(AnyInt8):
        def multiply(self, rows: Tensor) -> Tensor:
            seen.append(rows)
            return super().multiply(rows)

    pack(model, [given], kernels=[Watching], racer=ratio(2))
    assert torch.equal(seen[0], rows)


def test_the_clock_and_the_random_state() -> None:
    state = torch.get_rng_state()
    model, layers = quantize()
    torch.set_rng_state(state)
    pack(model, layers, kernels=[AnyInt8])
    assert torch.equal(torch.get_rng_state(), state)
    calls: list[str] = []
    found = race(lambda x: calls.append("d") or x, lambda x: calls.append("p") or x, torch.ones(1))  # type: ignore[func-returns-value]
    assert found.dense > 0
    assert found.packed > 0
    assert calls[:4] == ["d", "p", "d", "p"]


def test_int4_on_this_cpu() -> None:
    spec = GridSpec("int", 4, 32)
    model, layers = quantize(spec=spec, dtype=torch.bfloat16, intermediate_size=64)
    plain = [PackLayer(x.name, x.spec, x.grid) for x in layers]
    for layer in plain:
        model.get_submodule(layer.name)._forward_pre_hooks.clear()
    wanted = logits(model)
    report = pack(model, plain, tokens=1, force=True, kernels=[Int4WeightOnly])
    assert report.summary()["kernels"] == {"int4": 21}
    assert report.error < 5e-3
    assert float((logits(model) - wanted).norm() / wanted.norm()) < 0.03
