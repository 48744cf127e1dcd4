"""A bank holds what a pass would have seen, for any weighting, and can be trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress, engine
from lm_calib_plugin.bank import Bank, Part, build_bank
from lm_calib_plugin.bank.packed import pack, unpack
from lm_calib_plugin.errors import CalibError, UserError
from tests.bank import tools
from tests.tiny import make_model

QUIET = Runtime(progress=False)


def ids(lengths: list[int], seed: int = 0) -> CalibrationSet:
    generator = torch.Generator().manual_seed(seed)
    return CalibrationSet.of(
        [torch.randint(3, 90, (n,), generator=generator) for n in lengths], seqlen=12
    )


A, B, C = ids([12, 7, 12, 9], 1), ids([12, 12], 2), ids([10, 12, 5], 3)
PARTS = [
    Part("a", "choose", A, groups=2),
    Part("b", "choose", B, groups=2),
    Part("a", "judge", C),
]


def opened(folder: Path, name: str = "llama", parts: list[Part] | None = None) -> tuple:
    return tools.opened(folder, parts or PARTS, name)


def inputs_of(model: nn.Module, sequences: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Run whole sequences one by one through the plain model and note every linear input."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        m.register_forward_pre_hook(
            lambda _m, args, n=n: seen.setdefault(n, []).append(
                args[0].double().reshape(-1, args[0].shape[-1])
            )
        )
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        for sequence in sequences:
            model.eval()(input_ids=sequence[None])
    for hook in hooks:
        hook.remove()
    return seen


def test_packed_triangles_come_back() -> None:
    x = torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    gram = x.t() @ x
    gram = gram + gram.t()
    assert torch.equal(unpack(pack(gram), 7), gram)
    assert pack(gram).numel() == 28


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "qwen2"])
def test_the_bank_holds_what_the_model_saw(name: str, tmp_path: Path) -> None:
    model, _, bank = opened(tmp_path, name)
    everything = [*A.sequences, *B.sequences, *C.sequences]
    seen = inputs_of(model, everything)
    weights = torch.tensor([1.0, 2, 1, 2, 0.5, 3, 0, 0, 0], dtype=torch.float64)
    for row in bank.inputs:
        for layer in row.layers:
            x = seen[layer]
            energy = torch.stack([r.square().sum(0) for r in x])
            torch.testing.assert_close(bank.energy(row).double(), energy, rtol=1e-4, atol=1e-6)
            peak = torch.stack([r.abs().amax(0) for r in x])
            torch.testing.assert_close(bank.maximum(row).double(), peak, rtol=1e-2, atol=1e-6)
            mean = torch.stack([r.abs().mean(0) for r in x])
            torch.testing.assert_close(bank.mean(row).double(), mean, rtol=1e-2, atol=1e-6)
            gram = sum(w * r.t() @ r for w, r in zip(weights, x, strict=True))
            found = bank.gram(row, weights).gram().double()
            torch.testing.assert_close(found, gram, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(
                bank.moments(row, weights).energy().double(), gram.diagonal(), rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda", "sparsity": 0.5},
        {"method": "ria", "sparsity": 0.4},
        {"method": "sparsegpt", "sparsity": 0.5},
        {"method": "gptq", "bits": 3, "group_size": 8},
    ],
    ids=lambda o: o["method"],
)
def test_solving_from_the_bank_is_compressing_with_dense_statistics(
    options: dict, tmp_path: Path
) -> None:
    _, layers, bank = opened(tmp_path)
    recipe = Recipe(**options, propagate="dense", heldout=0)
    method = recipe.make_method()
    weights = torch.zeros(bank.sequences, dtype=torch.float64)
    weights[:4] = 1  # exactly the set A
    by_name = {layer.name: layer for layer in layers}
    other = make_model("llama")
    compress(other, None, recipe, QUIET, A)
    expected = dict(other.named_modules())
    for row in bank.inputs:
        stats = bank.statistics(row, method.statistic, weights)
        for name in row.layers:
            result = method.compress(by_name[name].read(), stats).weight
            agree = torch.isclose(result, expected[name].weight, rtol=1e-3, atol=1e-5)
            assert agree.float().mean() > 0.99


def test_sequence_weights_of_a_set_stay_with_it(tmp_path: Path) -> None:
    twice = CalibrationSet.of(list(B.sequences), seqlen=12, weights=[2, 1])
    _, _, bank = opened(tmp_path, parts=[Part("b", "all", twice)])
    _, _, plain = opened(tmp_path / "plain", parts=[Part("b", "all", B, groups=2)])
    ones = torch.ones(2, dtype=torch.float64)
    for row, other in zip(bank.inputs, plain.inputs, strict=True):
        expected = plain.gram(other, torch.tensor([2.0, 1.0], dtype=torch.float64)).gram()
        torch.testing.assert_close(bank.gram(row, ones).gram(), expected)
        torch.testing.assert_close(bank.moments(row, ones).energy(), expected.diagonal())


def test_an_interrupted_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_calib_plugin.bank.build import _Writer

    _, _, whole = opened(tmp_path / "whole")
    finish = _Writer.finish
    done: list[int] = []

    def fails(self: _Writer, index: int, *rest: object) -> None:
        if index == 2 and len(done) < 3:
            raise KeyboardInterrupt
        done.append(index)
        finish(self, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(_Writer, "finish", fails)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path)
    with pytest.raises(CalibError, match="not finished"):
        Bank.open(tmp_path / "bank")
    done.append(-1)
    _, _, bank = opened(tmp_path)
    assert done == [0, 1, -1, 2]  # what was finished is not done again
    assert bank.header.files.keys() == whole.header.files.keys()
    for row in bank.inputs:
        assert torch.equal(bank.energy(row), whole.energy(row))


def test_a_finished_build_is_opened_and_another_refused(tmp_path: Path) -> None:
    model, layers, bank = opened(tmp_path)
    again = build_bank(
        model, layers, engine.find_blocks(model), PARTS, tmp_path / "bank", runtime=QUIET
    )
    assert again.header == bank.header
    with pytest.raises(UserError, match="belongs to another bank"):
        opened(tmp_path, parts=PARTS[:2])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "bank").mkdir()
    (tmp_path / "full" / "bank" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        opened(tmp_path / "full")


def test_damage_is_noticed(tmp_path: Path) -> None:
    _, _, bank = opened(tmp_path)
    row = bank.inputs[0]
    file = tmp_path / "bank" / bank.header.files["0"]["name"]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CalibError, match="damaged: expected sha256"):
        Bank.open(tmp_path / "bank").energy(row)
    header = tmp_path / "bank" / "bank.json"
    good = header.read_text()
    header.write_text(good[:-20])
    with pytest.raises(CalibError, match="damaged"):
        Bank.open(tmp_path / "bank")
    header.write_text(json.dumps({**json.loads(good), "format_version": 99}))
    with pytest.raises(CalibError, match="upgrade"):
        Bank.open(tmp_path / "bank")
    header.unlink()
    with pytest.raises(CalibError, match="not finished"):
        Bank.open(tmp_path / "bank")
    with pytest.raises(CalibError, match="no statistics bank"):
        Bank.open(tmp_path)
    header.write_text(good)
    file.unlink()
    with pytest.raises(CalibError, match="missing"):
        Bank.open(tmp_path / "bank")


def test_weights_inside_a_group_must_agree_for_gram_matrices(tmp_path: Path) -> None:
    _, _, bank = opened(tmp_path)
    weights = torch.zeros(bank.sequences, dtype=torch.float64)
    weights[0] = 1  # one of two sequences of its group
    bank.moments(bank.inputs[0], weights)
    with pytest.raises(UserError, match="groups"):
        bank.gram(bank.inputs[0], weights)
    with pytest.raises(UserError, match="it holds"):
        bank.mixture({"c": 1.0}, "choose")


def test_first_tokens_stay_out(tmp_path: Path) -> None:
    model = make_model("llama")
    blocks = engine.find_blocks(model)
    layers, _ = engine.select_layers(model, blocks, None, ())
    bank = build_bank(
        model, layers, blocks, PARTS, tmp_path / "b", exclude_first_token=True, runtime=QUIET
    )
    seen = inputs_of(model, [*A.sequences, *B.sequences, *C.sequences])
    for row in bank.inputs:
        energy = torch.stack([r[1:].square().sum(0) for r in seen[row.name]])
        torch.testing.assert_close(bank.energy(row).double(), energy, rtol=1e-4, atol=1e-6)
    assert bank.header.sequences[0].tokens == 11


def test_experts_and_tokens_that_can_not_be_told_apart(tmp_path: Path) -> None:
    """Fused experts see few tokens each; sums per sequence still add up to what they saw."""
    _, layers, bank = opened(tmp_path, "qwen3_moe")
    experts = [row for row in bank.inputs if "experts" in row.name]
    assert experts
    total = sum(float(bank.energy(row).sum()) for row in experts)
    assert total > 0
    assert {n for row in bank.inputs for n in row.layers} == {x.name for x in layers}


def test_the_sets_are_kept_with_the_bank(tmp_path: Path) -> None:
    opened(tmp_path)
    assert CalibrationSet.load(tmp_path / "bank" / "sets" / "001").calib_id == B.calib_id


def test_gram_matrices_on_another_device_get_the_same_sum() -> None:
    from lm_calib_plugin.bank.build import _State

    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    state = _State(7, 1, [(0, 0)], "cpu")
    state.add_gram((0, 0), x, 2.0)
    state.add_gram((1, 0), x, 2.0)  # a cell that keeps none
    torch.testing.assert_close(state.grams[0, 0], 2 * x.t() @ x)
    state.grams[0, 0] = state.grams[0, 0].to("meta")
    state.add_gram((0, 0), x, 1.0)  # moved to where the sum is


def test_many_gram_matrices_wait_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_calib_plugin.bank.build import _State

    monkeypatch.setattr("lm_calib_plugin.bank.build.DEVICE_BYTES", 7 * 7 * 4)
    assert _State(7, 1, [(0, 0)], "meta").grams[0, 0].device.type == "meta"
    assert _State(7, 1, [(0, 0), (0, 1)], "meta").grams[0, 0].device.type == "cpu"
