"""Every architecture: blocks replay exactly, no layer is missed, masks match brute force."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress, engine
from lm_calib_plugin.engine.batches import make_chunks
from lm_calib_plugin.engine.capture import Recorder, replay
from tests.tiny import ARCHITECTURES, make_model, random_ids

NAMES = list(ARCHITECTURES)
QUIET = Runtime(progress=False, calib_batch_size=4)
EVEN, UNEVEN = [32] * 6, [32, 20, 7, 32, 15, 9]


def dense_inputs(model: nn.Module, modules: dict[str, nn.Module], lengths: list[int]) -> dict:
    """Inputs of modules in plain forward passes, one sequence at a time: no pads, no engine."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, args, n=name: seen[n].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for ids in random_ids(lengths):
            model(input_ids=ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [EVEN, UNEVEN], ids=["even", "padded"])
def test_blocks_replay_exactly(name: str, lengths: list[int]) -> None:
    model = make_model(name)
    blocks = engine.find_blocks(model)
    recorder = Recorder(model, blocks, torch.device("cpu"))
    outputs: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    with torch.no_grad():
        for chunk in make_chunks(random_ids(lengths), [], 3, 0):
            recorder.probe(make_chunks([chunk.ids[0, :4]], [], 1, 0)[0])
            recorder.record(chunk)
            outputs.clear()
            hooks = [block.register_forward_hook(keep) for block in blocks.modules]
            model(**recorder.inputs(chunk))
            for hook in hooks:
                hook.remove()
            hidden = chunk.hidden
            for block, call, whole in zip(blocks.modules, chunk.calls, outputs, strict=True):
                hidden = replay(block, call, hidden)
                assert torch.equal(hidden, whole)


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_layer_is_found(name: str) -> None:
    model = make_model(name)
    layers, left = engine.select_layers(model, engine.find_blocks(model), None, ())
    per_block = ARCHITECTURES[name][2]
    assert len(layers) == 3 * per_block
    blocks = engine.find_blocks(model).modules
    matrices = sum(p.numel() for p in blocks.parameters() if p.dim() >= 2)
    left_size = sum(_size(model, name) for name, _ in left)
    assert sum(layer.stored.numel() for layer in layers) + left_size == matrices


def _size(model: nn.Module, name: str) -> int:
    parameters = dict(model.named_parameters())
    return (parameters[name] if name in parameters else parameters[f"{name}.weight"]).numel()


@pytest.mark.parametrize("name", NAMES)
def test_wanda_masks_match_brute_force(name: str) -> None:
    dense = make_model(name)
    layers, _ = engine.select_layers(dense, engine.find_blocks(dense), None, ())
    modules = {x.name: x.module for x in layers if x.expert is None}
    inputs = dense_inputs(dense, modules, UNEVEN)
    model = copy.deepcopy(dense)
    recipe = Recipe(method="wanda", sparsity=0.5, propagate="dense", heldout=0)
    calibration = CalibrationSet.of(random_ids(UNEVEN), seqlen=32)
    report = compress(model, None, recipe, QUIET, calibration)
    assert report.achieved["sparsity"] == 0.5
    found = dict(model.named_modules())
    for layer in layers:
        if layer.expert is not None:
            continue
        scores = layer.weight.double().abs() * inputs[layer.name].square().sum(0).sqrt()
        order = scores.argsort(dim=1)
        expected = torch.ones_like(scores, dtype=torch.bool)
        expected.scatter_(1, order[:, : scores.shape[1] // 2], False)
        weight = found[layer.name].weight
        kept = (weight.t() if layer.transposed else weight) != 0
        assert torch.equal(kept, expected), layer.name


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_see_the_tokens_routed_to_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Their own tokens only, however few.
    monkeypatch.setattr("lm_calib_plugin.engine.experts.ENOUGH", 0)
    dense = make_model(name)
    experts = {n: m for n, m in dense.named_modules() if hasattr(m, "is_transposed")}
    calls: dict[str, list] = {n: [] for n in experts}
    hooks = [
        m.register_forward_pre_hook(lambda _m, args, n=n: calls[n].append(args))
        for n, m in experts.items()
    ]
    with torch.no_grad():
        for ids in random_ids(UNEVEN):
            dense(input_ids=ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    model = copy.deepcopy(dense)
    recipe = Recipe(method="wanda", sparsity=0.5, propagate="dense", heldout=0)
    report = compress(model, None, recipe, QUIET, CalibrationSet.of(random_ids(UNEVEN), seqlen=32))
    rows = {row.name: row for row in report.layers}
    after = dict(model.named_modules())
    for path, module in experts.items():
        for e in range(module.down_proj.shape[0]):
            seen, inner = [], []
            for hidden, index, _ in calls[path]:
                for token in range(hidden.shape[0]):
                    if e in index[token].tolist():
                        x = hidden[token].double()
                        gate, up = (module.gate_up_proj[e].double() @ x).chunk(2)
                        seen.append(x)
                        inner.append(torch.nn.functional.silu(gate) * up)
            assert rows[f"{path}.{e}.gate_up_proj"].tokens == len(seen)
            for part, inputs in (("gate_up_proj", seen), ("down_proj", inner)):
                norms = torch.stack(inputs).square().sum(0).sqrt()
                scores = getattr(module, part)[e].double().abs() * norms
                cut = scores.shape[1] // 2
                threshold = scores.sort(dim=1).values[:, cut : cut + 1]
                kept = getattr(after[path], part)[e] != 0
                assert torch.equal(kept, scores >= threshold)
