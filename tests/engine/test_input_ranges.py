"""Ranges that the walk collects, against plain passes of one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.engine import Plan, find_blocks, find_layers, run
from lm_calib_plugin.engine.activations import install
from lm_calib_plugin.engine.batches import make_chunks
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.quantization.activations import ActivationSpec
from lm_calib_plugin.statistics import LayerStats, Ranges, ranges_in
from tests.tiny import make_model, random_ids

SEQUENCES = random_ids([9, 14, 6, 14, 11])


@dataclass(frozen=True)
class Watching(Method):
    """Leaves weights as they are, and remembers the statistics in the order of the layers."""

    kind: ClassVar[str] = "quantization"
    statistic: ClassVar[str] = "ranges"
    found: Any = None

    def compress(
        self, weight: Tensor, stats: LayerStats | None, dtype: torch.dtype = torch.float32
    ) -> LayerResult:
        self.found.append(ranges_in(stats))
        return LayerResult(weight)


def walked(model: Any, layers: list[TargetLayer], size: int) -> dict[str, Ranges]:
    found: list[Ranges] = []
    chunks = make_chunks(SEQUENCES, [], size, pad_id=0)
    plan = Plan(Watching(found=found), layers)
    with left_as_found(model):
        run(model, find_blocks(model), chunks, plan, torch.device("cpu"), progress=False)
    return dict(zip([layer.name for layer in layers], found, strict=True))


def inputs(model: Any, layers: list[TargetLayer]) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda _m, args: seen.__setitem__(name, args[0][0].double().abs())

    hooks = [layer.module.register_forward_pre_hook(note(layer.name)) for layer in layers]
    for ids in SEQUENCES:
        with torch.no_grad():
            model(input_ids=ids[None], use_cache=False)
        yield dict(seen)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pads_do_not_count_and_first_tokens_are_known(name: str, size: int) -> None:
    model = make_model(name)
    layers = find_layers(find_blocks(model))[0]
    found = walked(model, layers, size)
    sequences = list(inputs(model, layers))
    for layer in layers:
        ranges = found[layer.name]
        parts = [seen[layer.name] for seen in sequences]
        later = torch.cat([x[1:] for x in parts])
        near = {"rel": 1e-4, "abs": 1e-5}
        assert ranges.tokens == sum(len(s) for s in SEQUENCES)
        assert ranges.limit == pytest.approx(float(torch.cat(parts).max()), **near)
        assert ranges.limit_without_first == pytest.approx(float(later.max()), **near)
        torch.testing.assert_close(
            ranges.mean_abs().double(), torch.cat(parts).mean(0), rtol=1e-3, atol=1e-5
        )


def test_a_model_with_rounded_inputs_is_walked_like_any_other() -> None:
    """Layers that share an input are still seen to do so, and receive rounded values."""
    model = make_model()
    layers = find_layers(find_blocks(model))[0]
    install(layers, ActivationSpec("int", 2))
    found = walked(model, layers, 5)
    dense = make_model()
    plain = walked(dense, find_layers(find_blocks(dense))[0], 5)
    for name, ranges in found.items():
        low, high, counts = ranges.bins()
        zeros = float(counts[(low == 0) & (high == 0)].sum()) / float(counts.sum())
        assert zeros > 0.2, name
        assert plain[name].quantile(0.2) > 0
    query, key = (found[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    assert query is key
