"""Scaled inputs: the block computes the same, statistics follow, nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from lm_calib_plugin import engine
from lm_calib_plugin.engine.batches import Chunk, make_chunks
from lm_calib_plugin.engine.capture import Recorder, replay
from lm_calib_plugin.engine.layers import TargetLayer, find_layers
from lm_calib_plugin.engine.smoothing import ScaledInput, scale_inputs
from lm_calib_plugin.engine.wiring import wiring_of
from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.quantization.grids import GridSpec
from lm_calib_plugin.quantization.parts import InputScaling, Scaling
from lm_calib_plugin.quantization.transforms.awq import AWQ
from lm_calib_plugin.quantization.transforms.smoothquant import SmoothQuant
from lm_calib_plugin.statistics import STATISTICS, LayerStats
from tests.engine.test_wiring import NAMES, any_model, logits
from tests.tiny import random_ids

SPEC = GridSpec(bits=4, group_size=-1)


def nearest(_layer: TargetLayer, weight: torch.Tensor) -> torch.Tensor:
    return SPEC.fit(weight).round(weight)


class Walk:
    """A model whose blocks are replayed on two uneven sequences, and statistics by hook."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = engine.find_blocks(model)
        self.wiring = wiring_of(model, self.blocks)
        self.layers = [x for x in find_layers(self.blocks)[0] if x.expert is None]
        self.chunk: Chunk = make_chunks(random_ids([16, 11]), [], 2, 0)[0]
        recorder = Recorder(model, self.blocks, torch.device("cpu"))
        with torch.no_grad():
            recorder.probe(make_chunks(random_ids([4]), [], 1, 0)[0])
            recorder.record(self.chunk)

    def layers_of(self, index: int) -> list[TargetLayer]:
        return [layer for layer in self.layers if layer.block == index]

    def stats(self, index: int, kind: str) -> dict[str, LayerStats]:
        found = {x.name: STATISTICS[kind](x.shape[1]) for x in self.layers_of(index)}
        counted = self.chunk.counted()
        hooks = []
        for layer in self.layers_of(index):

            def see(_m: Any, args: tuple, layer: TargetLayer = layer) -> None:
                rows = args[0].reshape(-1, args[0].shape[-1])[counted]
                found[layer.name].update(rows)

            hooks.append(layer.module.register_forward_pre_hook(see))
        with torch.no_grad():
            replay(self.blocks.modules[index], self.chunk.calls[index], self.chunk.hidden)
        for hook in hooks:
            hook.remove()
        return found

    def scale(self, index: int, transform: InputScaling, layers: Any = None) -> list[ScaledInput]:
        stats = self.stats(index, transform.statistic)
        layers = self.layers_of(index) if layers is None else layers
        return scale_inputs(
            self.blocks,
            index,
            self.wiring,
            layers,
            self.chunk,
            lambda layer: stats[layer.name],
            transform,
            nearest,
            None,
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", [AWQ(steps=5), SmoothQuant()], ids=["awq", "smoothquant"])
def test_logits_stay_and_statistics_follow(name: str, transform: InputScaling) -> None:
    model = any_model(name)
    walk, before = Walk(model), logits(model)
    done = 0
    for index in range(3):
        old = walk.stats(index, "gram+ranges")
        records = walk.scale(index, transform)
        new = walk.stats(index, "gram+ranges")
        seen = set()
        for record in records:
            for layer in record.layers:
                seen.add(layer.name)
                expected = old[layer.name].divided(record.factors)
                torch.testing.assert_close(
                    new[layer.name].gram(), expected.gram(), rtol=2e-3, atol=1e-4
                )
        for other in set(old) - seen:
            torch.testing.assert_close(new[other].gram(), old[other].gram(), rtol=2e-3, atol=1e-4)
        done += len(records)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3 * before.std().item())
    skips = name in ("opt_post_norm", "bloom_post")
    assert done if transform.feeds == "all" or not skips else not done


def test_smoothquant_scales_only_what_comes_from_norms() -> None:
    walk = Walk(any_model("llama"))
    sources = [r.source.split(".", 3)[3] for r in walk.scale(0, SmoothQuant())]
    assert sources == ["input_layernorm", "post_attention_layernorm"]
    sources = [r.source.split(".", 3)[3] for r in Walk(any_model("llama")).scale(0, AWQ(steps=2))]
    assert sources[:2] == ["self_attn.v_proj", "mlp.up_proj"]


def test_awq_lowers_the_error_of_the_rounded_block_inputs() -> None:
    walk = Walk(any_model("llama"))
    x = {n: s.gram() for n, s in walk.stats(1, "gram+ranges").items()}
    plain = {}
    for layer in walk.layers_of(1):
        w = layer.read()
        change = nearest(layer, w) - w
        plain[layer.name] = float(((change @ x[layer.name]) * change).sum())
    for record in walk.scale(1, AWQ()):
        assert record.after <= record.before
        # Rows of v and up were divided in between, so their own error changed with them.
        if "norm" not in record.source:
            assert record.before == pytest.approx(plain[record.layers[0].name], rel=1e-4)
        total = 0.0
        for layer in record.layers:
            w = layer.read()
            change = (nearest(layer, w) - w) / record.factors
            total += float(((change @ x[layer.name]) * change).sum())
        if "norm" in record.source:
            assert total == pytest.approx(record.after, rel=1e-3)


def test_readers_that_are_not_compressed_are_scaled_too() -> None:
    model = any_model("llama")
    walk, before = Walk(model), logits(model)
    layers = [x for x in walk.layers_of(0) if "q_proj" in x.name]
    q = next(x for x in walk.layers_of(0) if "k_proj" in x.name).read()
    (record,) = walk.scale(0, SmoothQuant(), layers)
    assert [x.name for x in record.layers] == ["model.layers.0.self_attn.q_proj"]
    assert len(record.readers) == 3
    assert not torch.equal(q, next(x for x in walk.layers_of(0) if "k_proj" in x.name).read())
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3 * before.std().item())
    assert walk.scale(0, SmoothQuant(), []) == []


@dataclass(frozen=True)
class Fixed(InputScaling):
    """The same value for every channel."""

    statistic: ClassVar[str] = "ranges"
    value: float = 2.0

    def scales(self, weights, stats, rounded, activations, tie) -> Scaling:
        return Scaling(torch.full((weights[0].shape[1],), self.value))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_that_make_no_sense_are_refused(value: float) -> None:
    walk = Walk(any_model("llama"))
    with pytest.raises(NumericalError, match=r"model.layers.0.*not finite and positive"):
        walk.scale(0, Fixed(value=value))


def test_a_forgotten_reader_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = Walk(any_model("llama"))
    feed = walk.wiring.feeds(2)[-1]
    object.__setattr__(feed, "readers", feed.readers[:1])
    with pytest.raises(NumericalError, match=r"model.layers.2.*output of the block changes"):
        walk.scale(2, Fixed())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_models_in_16_bits_pass_the_check(name: str, dtype: torch.dtype) -> None:
    model = any_model(name).to(dtype)
    walk = Walk(model)
    for index in range(3):
        assert walk.scale(index, AWQ(steps=4))
