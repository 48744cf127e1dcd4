"""Quantized keys and values, against attention written by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.engine import weights_digest
from lm_calib_plugin.engine.kv_cache import check_kv, kv_bits, quantize_kv, remove_kv
from lm_calib_plugin.errors import UnsupportedModelError, UserError
from tests.tiny import ARCHITECTURES, make_model, random_ids

IDS = torch.stack(random_ids([14, 14]))
# Attention of these looks no function up.
OUTSIDE = ("falcon", "falcon_alibi", "bloom")
INSIDE = [n for n in ARCHITECTURES if n not in OUTSIDE]


def logits(model: Any, ids: Tensor = IDS, **how: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **how).logits


def naive_round(x: Tensor, bits: int) -> Tensor:
    """Round every vector ``[..., head]`` by itself."""
    flat, half = x.double().reshape(-1, x.shape[-1]), (2**bits - 1) / 2
    for row in flat:
        amax = row.abs().max().clone()
        row.copy_(torch.round(row * half / amax).clamp(-half - 0.5, half - 0.5) * amax / half)
    return flat.reshape(x.shape).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]


def heads(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bits: int | None) -> Tensor:
    """Causal attention, one position after the other; ``[batch, tokens, heads * size]``."""
    if bits is not None:
        k, v = naive_round(k, bits), naive_round(v, bits)
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    out = torch.empty_like(q)
    for t in range(q.shape[2]):
        scores = (k[:, :, : t + 1] @ q[:, :, t, :, None])[..., 0] / math.sqrt(q.shape[-1])
        out[:, :, t] = (scores.softmax(-1)[..., None, :] @ v[:, :, : t + 1])[..., 0, :]
    return out.transpose(1, 2).flatten(2)


def by_hand(model: Any, name: str, bits: int | None) -> None:
    """Replace attention in every block by one that is written out."""
    size = 8

    def opt(m: Any) -> Any:
        def forward(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            q, k, v = (heads(p(hidden_states), size) for p in (m.q_proj, m.k_proj, m.v_proj))
            return m.out_proj(attend(q, k, v, bits)), None

        return forward

    def gpt2(m: Any) -> Any:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
            q, k, v = (heads(p, size) for p in m.c_attn(hidden_states).split(32, dim=-1))
            return m.c_proj(attend(q, k, v, bits)), None

        return forward

    def llama(m: Any) -> Any:
        def forward(
            hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
        ) -> tuple[Tensor, None]:
            q, k, v = (heads(p(hidden_states), size) for p in (m.q_proj, m.k_proj, m.v_proj))
            if name == "qwen3":
                q, k = m.q_norm(q), m.k_norm(k)
            q, k = rotated(q, *position_embeddings), rotated(k, *position_embeddings)
            return m.o_proj(attend(q, k, v, bits)), None

        return forward

    made = {"opt": opt, "gpt2": gpt2}.get(name, llama)
    for path, module in list(model.named_modules()):
        if path.endswith(("self_attn", ".attn")):
            module.forward = made(module)


def assert_near(found: Tensor, expected: Tensor, dense: Tensor) -> None:
    """Equal but for a value or two near the middle between two levels, on which noise decides."""
    effect = (expected - dense).norm()
    assert effect > 1e-4 * dense.norm()
    assert (found - expected).norm() < 0.2 * effect


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
def test_logits_are_those_of_attention_written_out(name: str, bits: int, attention: str) -> None:
    model, naive = make_model(name, attn_implementation=attention), make_model(name)
    dense = logits(model)
    by_hand(naive, name, None)
    torch.testing.assert_close(logits(naive), dense, rtol=1e-4, atol=1e-5)
    quantize_kv(model, bits)
    by_hand(naive, name, bits)
    assert_near(logits(model), logits(naive), dense)


@pytest.mark.parametrize("name", INSIDE)
def test_generation_with_a_cache_is_scoring_without(name: str) -> None:
    model = make_model(name)
    quantize_kv(model, 3)
    made = model.generate(
        IDS,
        max_new_tokens=10,
        min_new_tokens=10,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    whole = logits(model, made.sequences[:, :-1], use_cache=False)
    stepwise = torch.stack(made.logits, dim=1)
    dense = logits(make_model(name), made.sequences[:, :-1], use_cache=False)
    start = IDS.shape[1] - 1
    assert_near(stepwise, whole[:, start:], dense[:, start:])


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_pads_change_nothing(name: str) -> None:
    model = make_model(name)
    quantize_kv(model, 4)
    alone = logits(model, IDS[:1, :9])
    mask = torch.ones_like(IDS)
    mask[0, 9:] = 0
    together = logits(model, IDS, attention_mask=mask)
    assert_near(together[:1, :9], alone, logits(make_model(name), IDS[:1, :9]))


@pytest.mark.parametrize("bits", [None, 16])
def test_sixteen_bits_leave_the_model_alone(bits: int | None) -> None:
    model = make_model()
    before, digest = logits(model), weights_digest(model)
    quantize_kv(model, bits)
    assert torch.equal(logits(model), before)
    assert model.config._attn_implementation == "sdpa"
    assert weights_digest(model) == digest
    quantize_kv(model, 4)
    assert kv_bits(model) == 4
    quantize_kv(model, bits)
    assert kv_bits(model) is None
    assert torch.equal(logits(model), before)


def test_a_second_width_replaces_the_first() -> None:
    model, once = make_model(), make_model()
    quantize_kv(model, 3)
    quantize_kv(model, 8)
    quantize_kv(once, 8)
    assert torch.equal(logits(model), logits(once))
    assert model.config._attn_implementation == "calib_kv8_sdpa"
    remove_kv(model)
    assert torch.equal(logits(model), logits(make_model()))


@pytest.mark.parametrize("name", OUTSIDE)
def test_attention_outside_the_interface_is_refused(name: str) -> None:
    model = make_model(name)
    before, implementation = logits(model), model.config._attn_implementation
    for refuse in (check_kv, lambda m: quantize_kv(m, 8)):
        with pytest.raises(UnsupportedModelError, match="can not be reached in (Falcon|Bloom)"):
            refuse(model)
    assert torch.equal(logits(model), before)
    assert model.config._attn_implementation == implementation


def test_nothing_of_it_is_stored(tmp_path: Path) -> None:
    model = make_model()
    quantize_kv(model, 4)
    model.save_pretrained(tmp_path)
    stored = (tmp_path / "config.json").read_text()
    assert "calib_kv" not in stored
    make_model().save_pretrained(tmp_path / "plain")
    assert json.loads(stored) == json.loads((tmp_path / "plain" / "config.json").read_text())
    assert model.config._attn_implementation == "calib_kv4_sdpa"


def test_copies_and_casts_keep_it() -> None:
    model = make_model()
    quantize_kv(model, 4)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    remove_kv(model)
    assert kv_bits(copied) == 4
    half = copied.to(torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16


def test_digest_tells_the_width() -> None:
    found = set()
    for bits in (None, 4, 8):
        model = make_model()
        quantize_kv(model, bits)
        found.add(weights_digest(model))
    assert len(found) == 3


def test_a_check_changes_nothing() -> None:
    model = make_model()
    before = logits(model)
    check_kv(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), before)
    quantize_kv(model, 4)
    rounded = logits(model)
    check_kv(model)
    assert kv_bits(model) == 4
    assert torch.equal(logits(model), rounded)


@pytest.mark.parametrize("bits", [1, 9, 0, 32])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match="2 to 8"):
        quantize_kv(make_model(), bits)


def test_other_attention_is_refused() -> None:
    model = make_model()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="attn_implementation=sdpa"):
        quantize_kv(model, 8)
    assert model.config._attn_implementation == "flex_attention"


def test_training_flags_and_random_state_are_left_as_found() -> None:
    model = make_model("gpt2").train()
    state = torch.get_rng_state()
    quantize_kv(model, 8)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
