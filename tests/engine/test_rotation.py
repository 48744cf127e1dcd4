"""Rotated models: equal logits, in place, no outlying channels, the rest refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_calib_plugin import engine
from lm_calib_plugin.engine.rotation import MAPPED, check_rotation, rotate
from lm_calib_plugin.errors import NumericalError, UnsupportedModelError
from tests.engine.test_wiring import NAMES, any_model, logits

ROTATED = [n for n in NAMES if any_model(n).config.model_type in MAPPED]
REFUSED = [n for n in NAMES if n not in ROTATED]


def turn(model: Any, **options: Any) -> dict[str, Any]:
    return rotate(model, engine.find_blocks(model), **{"seed": 0, **options})


def same_logits(model: Any, before: torch.Tensor) -> None:
    after = logits(model)
    assert float((after - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("r2", [True, False])
def test_logits_stay(name: str, r2: bool) -> None:
    model = any_model(name)
    before, held = logits(model), {n: p for n, p in model.named_parameters()}
    weights = {n: p.detach().clone() for n, p in held.items()}
    tied = model.config.tie_word_embeddings
    record = turn(model, r2=r2)
    same_logits(model, before)
    assert record["head_untied"] == tied
    assert record["logits_difference"] < 1e-4
    assert record["head_dim"] == (
        model.model.layers[0].self_attn.o_proj.in_features // 4 if r2 else None
    )
    now = dict(model.named_parameters())
    assert all(now[n] is p for n, p in held.items())
    assert set(now) - set(held) == ({"lm_head.weight"} if tied else set())
    # Every matrix took part; only biases of readers and norms of single heads did not.
    still = {n for n, p in held.items() if torch.equal(p, weights[n])}
    assert all(held[n].dim() == 1 for n in still)
    assert not any("layernorm" in n for n in still)
    norms = [p for n, p in held.items() if n.endswith(("layernorm.weight", "model.norm.weight"))]
    assert len(norms) == 7
    expected = 1 - MAPPED[model.config.model_type]
    assert all(bool((p == expected).all()) for p in norms)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 24, "head_dim": 10},
        {"hidden_size": 40, "head_dim": 16, "num_key_value_heads": 4},
        {"hidden_size": 28, "head_dim": 6, "num_key_value_heads": 1},
        {"hidden_size": 576, "head_dim": 64, "num_hidden_layers": 2},
        {"hidden_size": 36, "head_dim": 14, "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_any_size(sizes: dict[str, Any]) -> None:
    for name in ("llama", "qwen3"):
        model = any_model(name, **sizes)
        before = logits(model)
        record = turn(model)
        same_logits(model, before)
        assert record["hadamard"] == (sizes["hidden_size"] in (40, 576))


def test_biases_of_writers_are_rotated() -> None:
    model = any_model("llama_bias")
    assert model.model.layers[0].self_attn.o_proj.bias is not None
    down = model.model.layers[0].mlp.down_proj.bias
    before = down.detach().clone()
    turn(model)
    assert not torch.equal(down, before)
    # A rotation keeps the length.
    torch.testing.assert_close(down.norm(), before.norm())


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_and_left_alone(name: str) -> None:
    model = any_model(name)
    blocks = engine.find_blocks(model)
    weights = copy.deepcopy(model.state_dict())
    for work in (check_rotation, lambda m, b: rotate(m, b, 0)):
        with pytest.raises(UnsupportedModelError, match=r"can not be rotated.*llama") as error:
            work(model, blocks)
        assert model.config.model_type in str(error.value)
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())


def test_blocks_with_something_more_are_refused() -> None:
    model = any_model("llama")
    model.model.layers[1].extra = torch.nn.Linear(32, 32)
    with pytest.raises(UnsupportedModelError, match=r"model.layers.1 has other matrices: extra"):
        check_rotation(model, engine.find_blocks(model))
    model = any_model("llama")
    model.model.layers[2].input_layernorm = torch.nn.LayerNorm(32)
    with pytest.raises(UnsupportedModelError, match=r"model.layers.2 has no RMSNorm"):
        check_rotation(model, engine.find_blocks(model))


def test_seeds_differ_and_repeat() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = any_model("llama")
        turn(model, seed=seed)
        return model.model.layers[1].mlp.down_proj.weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_outliers_are_spread() -> None:
    model = any_model("llama", hidden_size=64)
    # A few channels of the residual stream that are much larger than all others.
    model.model.embed_tokens.weight.data[:, [5, 40]] *= 60

    def kurtosis() -> list[float]:
        found: list[float] = []

        def see(_module: Any, args: tuple, kwargs: dict) -> None:
            x = (args[0] if args else kwargs["hidden_states"]).double()
            x = x - x.mean(-1, keepdim=True)
            moments = x.pow(4).mean(-1) / x.square().mean(-1).square()
            found.append(float(moments.mean()))

        hooks = [b.register_forward_pre_hook(see, with_kwargs=True) for b in model.model.layers]
        logits(model)
        for hook in hooks:
            hook.remove()
        return found

    before = kurtosis()
    turn(model)
    after = kurtosis()
    assert all(b > 15 for b in before)
    # A normal distribution has 3.
    assert all(a < 6 for a in after)


def test_a_wrong_map_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAPPED, "llama", 1.0)
    with pytest.raises(NumericalError, match=r"rotation: the logits change by"):
        turn(any_model("llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2", "qwen3_moe"])
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    model = any_model(name).to(dtype)
    assert turn(model)["logits_difference"] < 16 * torch.finfo(dtype).eps
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_an_untied_model_is_saved_and_loaded_whole(tmp_path: Any) -> None:
    model = any_model("llama_tied")
    turn(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    model.tie_weights()
    assert torch.equal(logits(again), logits(model))


def test_random_state_is_left_alone() -> None:
    model = any_model("llama")
    state = torch.random.get_rng_state()
    turn(model)
    assert torch.equal(state, torch.random.get_rng_state())
