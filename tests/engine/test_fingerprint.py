"""The digest of a model counts what it computes with, and nothing that using it changes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress, engine, packed
from lm_calib_plugin.execution import available
from tests.tiny import ARCHITECTURES, VOCAB, make_model, random_ids

HALVES = [1.0] * 4
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 2.0,
        "short_factor": HALVES,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
    },
}


def use(model: Any, length: int) -> None:
    ids = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_use_changes_nothing(name: str) -> None:
    model = make_model(name)
    before = engine.model_digest(model)
    for length in (5, 64, 5):
        use(model, length)
        assert engine.model_digest(model) == before


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_that_follow_the_text_do_not_count(kind: str) -> None:
    model = make_model(rope_parameters=ROPES[kind])
    before = engine.model_digest(model)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    use(model, 200)
    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert engine.model_digest(model) == before
    use(model, 5)
    assert engine.model_digest(model) == before
    model.model.rotary_emb.original_inv_freq.mul_(0.5)
    assert engine.model_digest(model) != before


def test_frequencies_of_one_kind_of_layer_do_not_count() -> None:
    kinds = ("sliding_attention", "full_attention")
    plain = {"rope_type": "default", "rope_theta": 1e4}
    model = make_model("gemma3", rope_parameters={kinds[0]: plain, kinds[1]: ROPES["dynamic"]})
    before = engine.model_digest(model)
    use(model, 200)
    assert engine.model_digest(model) == before
    model.model.rotary_emb.sliding_attention_inv_freq.mul_(0.5)
    assert engine.model_digest(model) != before


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("llama", "model.rotary_emb.inv_freq"),
        ("gemma2", "model.embed_tokens.embed_scale"),
        ("gemma3", "model.rotary_emb.full_attention_inv_freq"),
    ],
)
def test_buffers_that_are_not_stored_count(name: str, buffer: str) -> None:
    model = make_model(name)
    before = engine.model_digest(model)
    assert engine.model_digest(make_model(name)) == before
    value = model.get_buffer(buffer)
    kept = value.clone()
    value.copy_(value.bfloat16())
    assert engine.model_digest(model) != before
    value.copy_(kept)
    assert engine.model_digest(model) == before
    owner, _, last = buffer.rpartition(".")
    setattr(model.get_submodule(owner), last, kept.double())
    assert engine.model_digest(model) != before


def test_tables_that_grow_and_buffers_that_are_none_do_not_count() -> None:
    model = make_model()
    before = engine.model_digest(model)
    attention = model.model.layers[0].self_attn
    attention.register_buffer("cos_cached", torch.ones(3), persistent=False)
    attention.register_buffer("mask", None, persistent=False)
    assert engine.model_digest(model) == before
    attention.register_buffer("routing_cached", torch.ones(3))
    assert engine.model_digest(model) != before


@pytest.mark.skipif(
    "scheme=W8A8" not in available("cpu", torch.float32), reason="no int8 kernel on this CPU"
)
def test_kernels_compute_what_they_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "pack", functools.partial(packed.pack, force=True))
    found = set()
    for execution in ("simulated", "packed"):
        model = make_model()
        recipe = Recipe(method="rtn", scheme="W8A8_static", execution=execution)
        data = CalibrationSet.of(random_ids([16, 16]), seqlen=16)
        report = compress(model, None, recipe, Runtime(progress=False), data)
        assert (report.execution is not None) == (execution == "packed")
        found.add(engine.model_digest(model))
    assert len(found) == 1
