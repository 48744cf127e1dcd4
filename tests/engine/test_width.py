"""Heads and neurons: masks against a naive implementation, and against a model that is cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_calib_plugin import Recipe, compress, engine
from lm_calib_plugin.errors import UnsupportedModelError
from tests.engine.test_depth import HELD, LENGTHS, QUIET, calibration
from tests.engine.test_structure import assert_generates, assert_same
from tests.tiny import make_model, random_ids

NAMES = {
    "llama": ("self_attn", "o_proj", "mlp", ("gate_proj", "up_proj"), "down_proj"),
    "opt": ("self_attn", "out_proj", "", ("fc1",), "fc2"),
}
NAMES |= {name: NAMES["llama"] for name in ("qwen2", "qwen3", "gemma2", "gemma3", "mistral")}
HEAD = 8


def model_of(name: str) -> Any:
    """A model whose heads differ, so that some of them go beside neurons."""
    model = make_model(name)
    generator = torch.Generator().manual_seed(5)
    for block in engine.find_blocks(model).modules:
        attention = block.get_submodule(NAMES[name][0])
        scale = 10 ** torch.randn(attention.v_proj.out_features // HEAD, generator=generator)
        attention.v_proj.weight.data *= scale.repeat_interleave(HEAD)[:, None]
    return model


def parts(name: str, block: nn.Module) -> tuple[nn.Module, nn.Linear, list[nn.Linear], nn.Linear]:
    attention, output, mlp, firsts, last = NAMES[name]
    owner = block.get_submodule(mlp)
    attending = block.get_submodule(attention)
    return (
        attending,
        attending.get_submodule(output),
        [owner.get_submodule(n) for n in firsts],
        owner.get_submodule(last),
    )


def inputs(name: str, model: Any) -> dict[tuple[int, str], Tensor]:
    """Return what the output projections receive in plain passes, ``[tokens, in]``, float64."""
    twin = copy.deepcopy(model).double()
    seen: dict[tuple[int, str], list[Tensor]] = {}
    for index, block in enumerate(engine.find_blocks(twin).modules):
        _, output, _, last = parts(name, block)
        for kind, module in (("heads", output), ("neurons", last)):

            def note(_m: nn.Module, args: Any, key: Any = (index, kind)) -> None:
                seen.setdefault(key, []).append(args[0].reshape(-1, args[0].shape[-1]))

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        for i, ids in enumerate(random_ids(LENGTHS)):
            if i not in HELD:
                twin(input_ids=ids[None], use_cache=False)
    return {key: torch.cat(rows) for key, rows in seen.items()}


def naive(name: str, model: Any, sparsity: float) -> dict[tuple[int, str], set[int]]:
    """FLAP in plain terms, in float64: which units go, by block and kind."""
    seen = inputs(name, model)
    ranked, total = [], 0
    for index, block in enumerate(engine.find_blocks(model).modules):
        attention, output, firsts, last = parts(name, block)
        groups = attention.k_proj.out_features // HEAD
        per = attention.q_proj.out_features // HEAD // groups
        hidden = attention.q_proj.in_features
        bias = int(attention.q_proj.bias is not None)
        head = HEAD * ((per + 2) * (hidden + bias) + per * output.out_features)
        first_bias = int(firsts[0].bias is not None)
        neuron = len(firsts) * (hidden + first_bias) + last.out_features
        for kind, module, width, size in (
            ("heads", output, per * HEAD, head),
            ("neurons", last, 1, neuron),
        ):
            x = seen[index, kind]
            scores = x.var(dim=0, correction=0) * module.weight.double().square().sum(0)
            if kind == "heads":
                scores = scores**2
            scores = (scores - scores.mean()) / scores.std()
            for unit in range(len(scores) // width):
                value = float(scores.detach()[unit * width : (unit + 1) * width].mean())
                ranked.append((value, index, kind, unit, size))
                total += size
    found: dict[tuple[int, str], set[int]] = {}
    spent = 0
    for _, index, kind, unit, size in sorted(ranked):
        if spent + size > sparsity * total:
            break
        spent += size
        found.setdefault((index, kind), set()).add(unit)
    return found


def reported(report: Any) -> dict[tuple[int, str], set[int]]:
    rows = report.structure["ranking"]
    return {
        (i // 2, row["kind"]): set(row["removed"]) for i, row in enumerate(rows) if row["removed"]
    }


def flap(name: str, sparsity: float) -> tuple[Any, Any]:
    model = model_of(name)
    recipe = Recipe(method="flap", sparsity=sparsity)
    return model, compress(model, None, recipe, QUIET, calibration())


@pytest.mark.parametrize("sparsity", [0.2, 0.6])
@pytest.mark.parametrize("name", ["llama", "opt", "qwen2", "gemma2"])
def test_what_goes_is_what_a_naive_implementation_takes(name: str, sparsity: float) -> None:
    _, report = flap(name, sparsity)
    expected = naive(name, model_of(name), sparsity)
    assert reported(report) == expected
    assert {kind for _, kind in expected} == {"heads", "neurons"} or sparsity == 0.2


def cut(linear: nn.Linear, keep: Tensor, rows: bool) -> nn.Linear:
    """Return a linear layer with only some outputs (``rows``) or inputs."""
    weight = linear.weight.data[keep] if rows else linear.weight.data[:, keep]
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None)
    new.weight.data.copy_(weight)
    if linear.bias is not None:
        new.bias.data.copy_(linear.bias.data[keep] if rows else linear.bias.data)
    return new


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "opt"])
def test_masking_is_cutting(name: str) -> None:
    """The model that is physically smaller gives the same, and has the parameters reported."""
    model, report = flap(name, 0.45)  # some heads go, and no block loses all
    smaller = model_of(name)
    seen = inputs(name, smaller)
    gone = reported(report)
    saved = 0
    for index, block in enumerate(engine.find_blocks(smaller).modules):
        attention, output, firsts, last = parts(name, block)
        before = sum(p.numel() for p in block.parameters())
        groups = attention.k_proj.out_features // HEAD
        per = attention.q_proj.out_features // HEAD // groups
        heads = torch.tensor([g not in gone.get((index, "heads"), ()) for g in range(groups)])
        neurons = torch.tensor(
            [n not in gone.get((index, "neurons"), ()) for n in range(last.in_features)]
        )
        queries, keys = heads.repeat_interleave(per * HEAD), heads.repeat_interleave(HEAD)
        for linear, kind, keep in ((output, "heads", queries), (last, "neurons", neurons)):
            if bool(keep.all()):
                continue
            shift = linear.weight.double() @ (seen[index, kind].mean(0) * ~keep)
            if linear.bias is None:
                linear.bias = nn.Parameter(torch.zeros(linear.out_features))
            linear.bias.data += shift.float()
        assert bool(heads.any())  # no model can be built without heads
        attention.q_proj = cut(attention.q_proj, queries, True)
        attention.k_proj = cut(attention.k_proj, keys, True)
        attention.v_proj = cut(attention.v_proj, keys, True)
        setattr(attention, NAMES[name][1], cut(output, queries, False))
        if name == "opt":
            attention.num_heads = int(heads.sum())
        owner = block.get_submodule(NAMES[name][2])
        for local, first in zip(NAMES[name][3], firsts, strict=True):
            setattr(owner, local, cut(first, neurons, True))
        setattr(owner, NAMES[name][4], cut(last, neurons, False))
        saved += before - sum(p.numel() for p in block.parameters())
    assert_same(model, smaller)
    whole, left = report.achieved["parameters"]["blocks"]
    assert whole - left == saved
    assert any(kind == "heads" for _, kind in gone)
    assert_generates(model)


@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.5, 0.8])
def test_the_budget_is_kept_to_one_unit(sparsity: float) -> None:
    _, report = flap("llama", sparsity)
    rows = report.structure["ranking"]
    total = sum(row["units"] * row["parameters_each"] for row in rows)
    gone = sum(len(row["removed"]) * row["parameters_each"] for row in rows)
    assert sparsity * total - max(row["parameters_each"] for row in rows) < gone <= sparsity * total
    before, after = report.achieved["parameters"]["blocks"]
    biases = 32 * sum(bool(row["removed"]) for row in rows)
    assert before - after == gone - biases  # o_proj and down_proj got biases they did not have


def test_the_mean_in_the_bias_leaves_less_error_than_zeros() -> None:
    model, report = flap("opt", 0.4)
    for block in engine.find_blocks(model).modules:
        _, output, _, last = parts("opt", block)
        output.bias.data.zero_()
        last.bias.data.zero_()
    dense, error, size = model_of("opt"), 0.0, 0.0
    with torch.no_grad():
        for i, ids in enumerate(random_ids(LENGTHS)):
            if i in HELD:
                continue
            states = [m.model(input_ids=ids[None]).last_hidden_state for m in (model, dense)]
            error += float((states[0] - states[1]).square().sum())
            size += float(states[1].square().sum())
    assert report.structure["error"]["calibration"] < error / size


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("phi3", "Phi3Attention"),
        ("gpt2", "GPT2Attention"),
        ("falcon", "FalconAttention"),
        ("mixtral", r"model\.layers\.0\.mlp \(MixtralSparseMoeBlock\)"),
        ("bloom", "BloomAttention"),
    ],
)
def test_models_of_another_structure_are_refused_by_name(name: str, words: str) -> None:
    model = make_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=words):
        compress(model, None, Recipe(method="flap", sparsity=0.3), QUIET, calibration())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
