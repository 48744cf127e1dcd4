"""Which blocks go: every ranking against a second computation with plain forward passes."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress, engine
from lm_calib_plugin.engine import depth
from lm_calib_plugin.engine.sublayers import NAMES
from lm_calib_plugin.errors import NumericalError
from tests.tiny import make_model, random_ids

QUIET = Runtime(progress=False, calib_batch_size=4)
LENGTHS = [32, 20, 7, 32, 15, 9, 31, 3, 12, 32]
DEPTH = 4
HELD = engine.heldout_indices(len(LENGTHS), 0.1)


def calibration() -> CalibrationSet:
    return CalibrationSet.of(random_ids(LENGTHS), seqlen=32)


def model_of(name: str = "llama") -> Any:
    changes = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    key = "n_layer" if name in ("gpt2", "bloom") else "num_hidden_layers"
    return make_model(name, **{key: DEPTH}, **(changes if name == "gemma3" else {}))


def run(given: dict[str, Any], name: str = "llama", runtime: Runtime = QUIET) -> tuple[Any, Any]:
    model = model_of(name)
    report = compress(model, None, Recipe(**given), runtime, calibration())
    return model, report


def values(report: Any) -> list[float]:
    return [row["value"] for row in report.structure["ranking"]]


def used() -> list[Tensor]:
    return [ids for i, ids in enumerate(random_ids(LENGTHS)) if i not in HELD]


def exact(model: Any) -> Any:
    """Return a copy in float64; grouped products of experts know float32 only."""
    twin = copy.deepcopy(model)
    return (
        twin if "moe" in type(model).__name__.lower() + model.config.model_type else twin.double()
    )


@functools.cache
def streams(name: str) -> list[list[Tensor]]:
    """Return for every sequence the hidden states between blocks, ``[length, hidden]``, float64."""
    twin = exact(model_of(name))
    blocks = engine.find_blocks(twin).modules
    found: list[list[Tensor]] = []

    def first(_module: nn.Module, args: Any, kwargs: Any) -> None:
        found[-1].append((args[0] if args else kwargs["hidden_states"])[0].double())

    def later(_module: nn.Module, _args: Any, output: Any) -> None:
        found[-1].append((output if isinstance(output, Tensor) else output[0])[0].double())

    blocks[0].register_forward_pre_hook(first, with_kwargs=True)
    for block in blocks:
        block.register_forward_hook(later)
    with torch.no_grad():
        for ids in used():
            found.append([])
            twin(input_ids=ids[None], use_cache=False)
    return found


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("shortgpt", name) for name in ("llama", "opt", "gemma3", "qwen2_moe")),
        ("depth_cosine", "llama"),
        ("depth_l1", "opt"),
        ("depth_l2", "gemma3"),
    ],
)
def test_distances_are_those_of_plain_forward_passes(method: str, name: str) -> None:
    seen = streams(name)
    expected = []
    for index in range(DEPTH):
        before = torch.cat([s[index] for s in seen])
        after = torch.cat([s[index + 1] for s in seen])
        if method in ("shortgpt", "depth_cosine"):
            value = 1 - cosine(before, after)
        else:
            power = int(method[-1])
            value = (after - before).norm(power, dim=-1) / before.norm(power, dim=-1)
        expected.append(float(value.mean()))
    _, report = run({"method": method, "blocks": 2}, name)
    assert values(report) == pytest.approx(expected, rel=1e-4)
    lowest = sorted(sorted(range(DEPTH), key=lambda i: expected[i])[:2])
    path = engine.find_blocks(model_of(name)).path
    assert report.structure["removed"] == [f"{path}.{i}" for i in lowest]


def test_hidden_states_are_those_the_library_returns() -> None:
    """The same numbers from ``output_hidden_states``; its last entry is after the final norm."""
    model = model_of().double()
    total = torch.zeros(DEPTH - 1, dtype=torch.float64)
    count = 0
    with torch.no_grad():
        for ids in used():
            states = model(input_ids=ids[None], output_hidden_states=True).hidden_states
            for i in range(DEPTH - 1):
                total[i] += (1 - cosine(states[i][0], states[i + 1][0])).sum()
            count += len(ids)
    _, report = run({"method": "shortgpt", "blocks": 1})
    assert values(report)[:-1] == pytest.approx((total / count).tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 1), ("llama", 2), ("llama", 3), ("opt", 2), ("gemma3", 2)]
)
def test_angular_looks_at_last_tokens_of_a_run(name: str, count: int) -> None:
    seen = streams(name)
    expected = []
    for start in range(DEPTH - count + 1):
        before = torch.stack([s[start][-1] for s in seen])
        after = torch.stack([s[start + count][-1] for s in seen])
        expected.append(float((cosine(before, after).arccos() / math.pi).mean()))
    model, report = run({"method": "angular", "blocks": count}, name)
    assert values(report)[: len(expected)] == pytest.approx(expected, rel=1e-4)
    assert values(report)[len(expected) :] == [None] * (count - 1)
    start = expected.index(min(expected))
    path = engine.find_blocks(model).path
    assert report.structure["removed"] == [f"{path}.{i}" for i in range(start, start + count)]


# --- the loss ----------------------------------------------------------------------------


def skip(model: Any, gone: list[int], kind: str = "block") -> list[Any]:
    """Make blocks, or parts of them, add nothing, with plain hooks."""

    def same(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    def nothing(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return torch.zeros_like(output)
        return (torch.zeros_like(output[0]), *output[1:])

    handles = []
    for index in gone:
        block = engine.find_blocks(model).modules[index]
        if kind == "block":
            handles.append(block.register_forward_hook(same, with_kwargs=True))
            continue
        names = next(n for n in NAMES[kind] if all(hasattr(block, part) for part in n))
        handles.append(getattr(block, names[-1]).register_forward_hook(nothing))
    return handles


def loss_of(model: Any, gone: list[int], kind: str = "block") -> float:
    """Return the mean loss over all predicted calibration tokens by the model's own loss."""
    twin = exact(model)
    skip(twin, gone, kind)
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in used():
            loss = twin(input_ids=ids[None], labels=ids[None], use_cache=False).loss
            total += float(loss) * (len(ids) - 1)
            count += len(ids) - 1
    return total / count


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "block"),
        ("llama", "attention"),
        ("opt", "mlp"),
        ("gemma2", "block"),
        ("gemma2", "attention"),
        ("qwen2_moe", "mlp"),
    ],
)
def test_loss_is_that_of_the_model_without_the_part(name: str, kind: str) -> None:
    model = model_of(name)
    dense = loss_of(model, [])
    expected = [loss_of(model, [i], kind) - dense for i in range(DEPTH)]
    _, report = run({"method": "depth_loss", "blocks": 1, "sublayer": kind}, name)
    assert values(report) == pytest.approx(expected, rel=1e-2, abs=2e-6)
    assert [row["removed"] for row in report.structure["ranking"]].index(True) == expected.index(
        min(expected)
    )


@pytest.mark.parametrize("kind", ["block", "attention"])
def test_greedy_measures_anew_after_every_removal(kind: str) -> None:
    model = model_of()
    gone: list[int] = []
    for _ in range(3):
        left = [i for i in range(DEPTH) if i not in gone]
        gone.append(min(left, key=lambda i: loss_of(model, [*gone, i], kind)))
    given = {"method": "depth_loss", "blocks": 3, "sublayer": kind, "greedy": True}
    _, report = run(given)
    rounds = {row["round"]: i for i, row in enumerate(report.structure["ranking"])}
    assert [rounds[r] for r in (1, 2, 3)] == gone


# --- attention and MLP alone -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_sublayer_is_measured_by_its_own_branch(name: str, kind: str) -> None:
    """Stream before and after the part, in blocks with and without a norm behind it."""
    twin = model_of(name).double()
    branches: list[list[Tensor]] = []
    module = {"llama": {"attention": "self_attn", "mlp": "mlp"}}.get(
        name, {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
    )[kind]
    for block in twin.model.layers:

        def note(_m: nn.Module, _a: Any, output: Any) -> None:
            branches[-1].append((output if isinstance(output, Tensor) else output[0])[0])

        getattr(block, module).register_forward_hook(note)
    seen = streams(name)
    with torch.no_grad():
        for ids in used():
            branches.append([])
            twin(input_ids=ids[None], use_cache=False)
    expected = []
    for index in range(DEPTH):
        changes = []
        for states, branch in zip(seen, branches, strict=True):
            added = branch[index]
            before = states[index] if kind == "attention" else states[index + 1] - added
            changes.append(added.norm(dim=-1) / before.norm(dim=-1))
        expected.append(float(torch.cat(changes).mean()))
    _, report = run({"method": "depth_l2", "blocks": 1, "sublayer": kind}, name)
    assert values(report) == pytest.approx(expected, rel=1e-4)


# --- rules of the house ------------------------------------------------------------------

EVERY = [
    {"method": "shortgpt", "blocks": 2},
    {"method": "angular", "blocks": 2},
    {"method": "depth_l1", "blocks": 1, "sublayer": "attention", "update": "mean"},
    {"method": "depth_loss", "blocks": 2, "sublayer": "mlp", "update": "lowrank?rank=2"},
    {"method": "depth_loss", "blocks": 2, "greedy": True, "update": "lowrank"},
    {"method": "flap", "sparsity": 0.4},
]
every = pytest.mark.parametrize("given", EVERY, ids=lambda g: g["method"])


@every
def test_pads_and_chunk_size_do_not_matter(given: dict[str, Any]) -> None:
    _, one = run(given, runtime=Runtime(progress=False, calib_batch_size=1))
    for size in (3, 10):
        _, many = run(given, runtime=Runtime(progress=False, calib_batch_size=size))
        assert many.structure["removed"] == one.structure["removed"]
        for kind in ("calibration", "heldout"):
            assert many.structure["error"][kind] == pytest.approx(
                one.structure["error"][kind], rel=1e-3
            )


@every
def test_the_same_recipe_gives_the_same_bits(given: dict[str, Any]) -> None:
    reports = [run(given)[1] for _ in range(2)]
    assert reports[0].weights_digest == reports[1].weights_digest
    assert reports[0].key == reports[1].key
    assert reports[0].table() == reports[1].table()


@pytest.mark.parametrize(
    "given",
    [
        {"method": "shortgpt", "blocks": 0},
        {"method": "shortgpt", "sparsity": 0.24, "update": "mean"},  # floor(0.24 x 4) is none
        {"method": "angular", "sparsity": 0},
        {"method": "depth_loss", "blocks": 0, "sublayer": "attention"},
        {"method": "flap", "sparsity": 0},
    ],
    ids=str,
)
def test_zero_strength_changes_no_bit(given: dict[str, Any]) -> None:
    model, report = run(given)
    before = model_of()
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in before.state_dict().items()
    }
    assert report.structure["removed"] == []
    assert report.achieved["sparsity_model"] == 0
    dense = compress(model_of(), None, Recipe(method="wanda", sparsity=0), QUIET, calibration())
    assert report.key == dense.key


@every
def test_everything_is_left_as_found(given: dict[str, Any]) -> None:
    model = model_of().train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    state = torch.random.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    compress(model, None, Recipe(**given), QUIET, calibration())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    if given.get("update") is None:
        left = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        assert sum(left) <= sum(hooks)


def test_keys_know_what_matters() -> None:
    def key(**given: Any) -> str:
        return str(run({"method": "shortgpt", "blocks": 1, **given})[1].key)

    assert key() == key(propagate="dense")
    assert key(update="mean") != key(update="mean", propagate="dense")
    assert key(update="lowrank") == key(update="lowrank?rank=8&ridge=0.01")
    assert len({key(), key(blocks=2), key(sublayer="mlp"), key(update="mean")}) == 4


@pytest.mark.parametrize("given", EVERY[:5], ids=lambda g: g["method"])
def test_out_of_memory_halves_the_chunk(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(given)[1]
    plain = depth.replay

    def tight(block: Any, call: Any, hidden: Tensor) -> Tensor:
        if hidden.shape[0] > 2:
            raise torch.OutOfMemoryError("too large")
        return plain(block, call, hidden)

    monkeypatch.setattr(depth, "replay", tight)
    report = run(given)[1]
    assert report.structure["removed"] == expected.structure["removed"]
    for one, other in zip(values(report), values(expected), strict=True):
        assert one is other is None or one == pytest.approx(other, rel=1e-4)
    assert report.structure["error"]["calibration"] == pytest.approx(
        expected.structure["error"]["calibration"], rel=1e-3
    )
    assert any("out of memory" in note for note in report.warnings)


def test_what_is_no_number_is_named() -> None:
    model = model_of()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    recipe = Recipe(method="shortgpt", blocks=1)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj"):
        compress(model, None, recipe, QUIET, calibration())
    model = model_of()
    model.model.layers[2].mlp.register_forward_hook(lambda _m, _a, out: out / 0)
    with pytest.raises(NumericalError, match=r"model\.layers\.2, ranking"):
        compress(model, None, recipe, QUIET, calibration())
