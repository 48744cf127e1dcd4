"""What is left after blocks are taken out: a consistent model that generates, stores and copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress, engine
from lm_calib_plugin.engine.structure import delete_blocks
from lm_calib_plugin.errors import UnsupportedModelError, UserError
from tests.engine.test_depth import LENGTHS, QUIET, calibration, skip
from tests.tiny import make_model, random_ids

# A real model of 260,000 parameters, where one lies beside the checkout.
SMALL = "shared/models/stories260K"
STORIES = next((p / SMALL for p in Path(__file__).parents if (p / SMALL).is_dir()), None)
BLOCKS = ["llama", "qwen3", "gemma2", "gemma3", "opt", "gpt2", "gpt_neox", "falcon", "bloom"]
BLOCKS += ["mistral", "mixtral"]
PARTS = ["llama", "qwen2", "gemma2", "gemma3", "opt", "phi3", "gpt_neox", "falcon", "qwen3_moe"]


def compressed(name: str, given: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    model = make_model(name, **changes)
    report = compress(model, None, Recipe(**given), QUIET, calibration())
    return model, report


def numbers(report: Any) -> list[int]:
    ranking = report.structure["ranking"]
    return [i for i, row in enumerate(ranking) if row["removed"]]


def logits(model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [
            model(input_ids=ids[None], use_cache=False).logits[0] for ids in random_ids(LENGTHS)
        ]


def assert_same(model: Any, other: Any) -> None:
    for found, expected in zip(logits(model), logits(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def assert_generates(model: Any) -> None:
    """Tokens and their logits are the same with a cache, token by token, as without."""
    kept: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    kept |= {"eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    prompt = torch.tensor([[5, 6, 7, 8, 9], [11, 3, 4, 90, 7]])
    runs = [model.generate(prompt, use_cache=cache, **kept) for cache in (True, False)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for one, other in zip(runs[0].logits, runs[1].logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# --- whole blocks ------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [[0], [1, 2]], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_deleting_is_skipping(name: str, gone: list[int]) -> None:
    model, other = make_model(name), make_model(name)
    delete_blocks(model, engine.find_blocks(model), gone)
    skip(other, gone)
    assert_same(model, other)
    assert model.config.num_hidden_layers == 3 - len(gone)
    assert len(engine.find_blocks(model)) == 3 - len(gone)
    assert_generates(model)


def test_lists_of_the_configuration_lose_the_entries_of_removed_blocks() -> None:
    model = make_model("gemma3")
    eos = model.config.eos_token_id = [1, 2, 3]  # as long as there are blocks, by chance
    delete_blocks(model, engine.find_blocks(model), [0])
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.eos_token_id == eos
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    sparse = make_model("qwen2_moe", mlp_only_layers=[1])
    delete_blocks(sparse, engine.find_blocks(sparse), [0])
    assert sparse.config.mlp_only_layers == [0]


def test_depth_and_parameters_are_reported() -> None:
    model, report = compressed("llama", {"method": "shortgpt", "blocks": 2, "update": "mean"})
    dense = make_model()
    blocks = [sum(p.numel() for p in m.model.layers.parameters()) for m in (dense, model)]
    whole = [sum(p.numel() for p in m.parameters()) for m in (dense, model)]
    assert report.achieved["parameters"] == {"blocks": blocks, "model": whole}
    assert report.achieved["sparsity"] == 1 - blocks[1] / blocks[0]
    assert report.achieved["sparsity_model"] == 1 - whole[1] / whole[0]
    assert report.layers == []
    assert "without model.layers." in report.line()
    summary = report.summary()
    assert summary["removed"] == report.structure["removed"]
    assert set(summary["error"]["heldout"]) == {"last_hidden"}
    assert summary["recipe"]["blocks"] == 2
    assert report.table()["structure"]["ranking"] == report.structure["ranking"]


@pytest.mark.parametrize(
    "given",
    [
        {"method": "shortgpt", "blocks": 1},
        {"method": "shortgpt", "blocks": 1, "update": "lowrank?rank=3"},
        {"method": "depth_l1", "blocks": 1, "sublayer": "mlp", "update": "mean"},
        {"method": "flap", "sparsity": 0.3},
    ],
    ids=str,
)
def test_error_is_that_of_what_the_head_receives(given: dict[str, Any]) -> None:
    model, report = compressed("llama", given)
    held = engine.heldout_indices(len(LENGTHS), 0.1)
    moved = {True: 0.0, False: 0.0}
    size = {True: 0.0, False: 0.0}
    with torch.no_grad():
        for i, ids in enumerate(random_ids(LENGTHS)):
            dense = make_model().model(input_ids=ids[None]).last_hidden_state.double()
            now = model.model(input_ids=ids[None]).last_hidden_state.double()
            moved[i in held] += float((now - dense).square().sum())
            size[i in held] += float(dense.square().sum())
    for kind, flag in (("calibration", False), ("heldout", True)):
        expected = moved[flag] / size[flag]
        assert report.structure["error"][kind] == pytest.approx(expected, rel=1e-4)


# --- attention and MLP -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("name", PARTS)
def test_dropping_a_part_is_adding_nothing(name: str, kind: str) -> None:
    given = {"method": "depth_l2", "blocks": 2, "sublayer": kind}
    model, report = compressed(name, given)
    other = make_model(name)
    skip(other, numbers(report), kind)
    assert_same(model, other)
    assert_generates(model)
    before, after = report.achieved["parameters"]["blocks"]
    assert after == sum(p.numel() for p in engine.find_blocks(model).modules.parameters())
    assert 0 < after < before


@pytest.mark.parametrize("gone", [0, 1, 2])
@pytest.mark.parametrize("name", ["gemma3", "mistral", "opt"])
def test_any_attention_may_be_missing_from_the_cache(name: str, gone: int) -> None:
    """Lengths and masks are read from the first entry of each kind: it has to keep count."""
    model = make_model(name)
    for index, block in enumerate(engine.find_blocks(model).modules):
        module = getattr(block.self_attn, "o_proj", None) or block.self_attn.out_proj
        if index != gone:
            module.weight.data *= 100  # the other two can not be missed
    given = {"method": "depth_l2", "blocks": 1, "sublayer": "attention"}
    report = compress(model, None, Recipe(**given), QUIET, calibration())
    if name != "gemma3":  # where the norm behind attention undoes the scale
        assert numbers(report) == [gone]
    assert_generates(model)


def test_parts_that_can_not_be_left_out_are_refused_by_name() -> None:
    for name, words in (("bloom", "BloomBlock"), ("opt", "OPTDecoderLayer")):
        # OPT-350m puts its norms on the residual stream itself.
        changes = {"do_layer_norm_before": False} if name == "opt" else {}
        model = make_model(name, **changes)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        recipe = Recipe(method="shortgpt", blocks=1, sublayer="attention")
        with pytest.raises(UnsupportedModelError, match=f"{words}.*sublayer=block"):
            compress(model, None, recipe, QUIET, calibration())
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        compress(model, None, Recipe(method="shortgpt", blocks=1), QUIET, calibration())


# --- what stands in ----------------------------------------------------------------------


def constant(gone: list[int]) -> Any:
    """Return an OPT in which these blocks add one vector each, and the others much more."""
    model = make_model("opt")
    for index, block in enumerate(model.model.decoder.layers):
        generator = torch.Generator().manual_seed(index)
        for linear in (block.self_attn.out_proj, block.fc2):
            if index in gone:
                linear.weight.data.zero_()
                linear.bias.data.copy_(torch.randn(32, generator=generator) / 100)
            else:
                linear.weight.data *= 100
    return model


@pytest.mark.parametrize("gone", [[0], [1], [2], [0, 1], [1, 2], [0, 2]], ids=str)
@pytest.mark.parametrize("update", ["mean", "lowrank?rank=4&ridge=0.1"])
@pytest.mark.parametrize("propagate", ["compressed", "dense"])
def test_the_mean_of_a_constant_block_is_the_block(
    gone: list[int], update: str, propagate: str
) -> None:
    model, dense = constant(gone), constant(gone)
    given = {"method": "depth_l2", "blocks": len(gone), "update": update, "propagate": propagate}
    report = compress(model, None, Recipe(**given), QUIET, calibration())
    assert numbers(report) == gone
    assert_same(model, dense)
    assert report.structure["error"]["heldout"] < 1e-8
    assert_generates(model)


class LinearBlock(nn.Module):
    """``h + W h + c``, with the arguments of a decoder block."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        generator = torch.Generator().manual_seed(seed)
        self.linear.weight.data.copy_(torch.randn(32, 32, generator=generator) / 60)
        self.linear.bias.data.copy_(torch.randn(32, generator=generator) / 60)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states + self.linear(hidden_states)


@pytest.mark.parametrize("gone", [[0], [1], [1, 2]], ids=str)
def test_full_rank_without_ridge_is_a_linear_block(gone: list[int]) -> None:
    def make() -> Any:
        model = make_model()
        for index in gone:
            model.model.layers[index] = LinearBlock(index)
        return model.double()

    model, dense = make(), make()
    given = {"method": "shortgpt", "blocks": len(gone), "update": "lowrank?rank=32&ridge=0"}
    # Any other block would be harder to replace: make the linear ones the least.
    with torch.no_grad():
        for other in (model, dense):
            for index in range(3):
                if index not in gone:
                    for linear in (
                        other.model.layers[index].self_attn,
                        other.model.layers[index].mlp,
                    ):
                        for p in linear.parameters():
                            p *= 3
    report = compress(model, None, Recipe(**given), QUIET, calibration())
    assert numbers(report) == gone
    for found, expected in zip(logits(model), logits(dense), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "block"), ("llama", "attention"), ("qwen3_moe", "mlp")]
)
def test_a_better_stand_in_leaves_less_error(name: str, kind: str) -> None:
    errors = []
    for update in ("none", "mean", "lowrank?rank=4", "lowrank?rank=32&ridge=0.001"):
        given = {"method": "depth_l2", "blocks": 1, "sublayer": kind, "update": update}
        model, report = compressed(name, given)
        errors.append(report.structure["error"]["calibration"])
        assert_generates(model)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
def test_a_later_term_sees_what_the_recipe_says(propagate: str) -> None:
    """The mean of the second removed block, behind the term of the first or behind the block."""

    def make() -> Any:
        model = make_model(num_hidden_layers=4)
        for index in (1, 3):
            model.model.layers[index].self_attn.o_proj.weight.data *= 50
        return model

    model, dense = make(), make()
    given = {"method": "depth_l2", "blocks": 2, "update": "mean", "propagate": propagate}
    report = compress(model, None, Recipe(**given, heldout=0), QUIET, calibration())
    assert numbers(report) == [0, 2]
    first, second = (
        model.model.layers[0].get_submodule(n) for n in ("recovered_before", "recovered_after")
    )
    if propagate == "compressed":
        skip(dense, [0])
        dense.model.layers[1].register_forward_pre_hook(first.added_before, with_kwargs=True)
    seen: list[Tensor] = []
    dense.model.layers[2].register_forward_hook(
        lambda _m, args, out: seen.append(out[0].double() - args[0][0].double())
    )
    logits(dense)
    torch.testing.assert_close(second.shift.double(), torch.cat(seen).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [
        {"method": "shortgpt", "blocks": 2, "update": "lowrank?rank=2"},
        {"method": "depth_l1", "blocks": 1, "sublayer": "attention", "update": "mean"},
        {"method": "flap", "sparsity": 0.3},
    ],
    ids=str,
)
def test_terms_are_stored_and_copied_with_the_model(given: dict[str, Any]) -> None:
    model, _ = compressed("llama", given)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # what the copy does depends on nothing of the original
    other, _ = compressed("llama", given)
    assert_same(twin, other)
    stored = twin.state_dict()
    assert sum(v.numel() for v in stored.values()) == sum(
        p.numel() for p in other.state_dict().values()
    )
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(stored | other.state_dict())
    assert_same(twin, other)
    assert not any(module.training for module in other.modules())


@pytest.mark.parametrize("first", [True, False])
def test_a_shortened_model_can_be_compressed_again(first: bool) -> None:
    """Terms before the first block and after the last one are replayed with their blocks."""
    index = 0 if first else 2
    model = constant([index])
    given = {"method": "depth_l2", "blocks": 1, "update": "lowrank?rank=2"}
    report = compress(model, None, Recipe(**given), QUIET, calibration())
    assert numbers(report) == [index]
    other = copy.deepcopy(model)
    report = compress(model, None, Recipe(method="wanda", sparsity=0), QUIET, calibration())
    assert_same(model, other)
    assert all(row.error_calibration == 0 for row in report.layers)
    again = compress(model, None, Recipe(**given), QUIET, calibration())
    assert again.structure["error"]["calibration"] < 1
    assert_generates(model)


# --- refusals ----------------------------------------------------------------------------


def test_models_whose_blocks_need_each_other_are_refused() -> None:
    model = make_model()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(UnsupportedModelError, match="blocks 0 and 2 of LlamaForCausalLM share"):
        compress(model, None, Recipe(method="shortgpt", blocks=1), QUIET, calibration())
    model = make_model()
    model.config.num_kv_shared_layers = 1
    with pytest.raises(UnsupportedModelError, match="shares keys and values"):
        compress(model, None, Recipe(method="shortgpt", blocks=1), QUIET, calibration())
    model = make_model()
    model.config.use_cla = True
    with pytest.raises(UnsupportedModelError, match="use_cla"):
        compress(model, None, Recipe(method="flap", sparsity=0.2), QUIET, calibration())


@pytest.mark.parametrize("given", [{"blocks": 3}, {"blocks": 7, "sublayer": "attention"}], ids=str)
def test_something_has_to_stay(given: dict[str, Any]) -> None:
    recipe = Recipe(method="shortgpt", **given)
    with pytest.raises(UserError, match=f"got {given['blocks']}, the model has 3.*blocks<=2"):
        compress(make_model(), None, recipe, QUIET, calibration())


def test_a_linear_map_has_no_place_between_two_layers() -> None:
    recipe = Recipe(method="shortgpt", blocks=1, sublayer="mlp", update="lowrank")
    with pytest.raises(UserError, match=r"fc1\+fc2.*update=mean"):
        compress(make_model("opt"), None, recipe, QUIET, calibration())


# --- a real model ------------------------------------------------------------------------


@pytest.mark.skipif(STORIES is None, reason="the small real model is not there")
def test_on_a_real_model_the_loss_knows_best() -> None:
    """One block less costs little by the loss, more by chance; a stand-in gives some back."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    text = (
        "Once upon a time there was a little girl named Lily. She loved to play in the park with "
        "her dog. One day she saw a big tree and wanted to climb it. Her mom said it was too high. "
    )
    ids = torch.tensor(tokenizer(text * 8)["input_ids"])
    data = CalibrationSet.of(list(ids[: len(ids) // 64 * 64].view(-1, 64)), seqlen=64)

    def loss(model: Any) -> float:
        with torch.no_grad():
            rows = torch.stack(list(data.sequences))
            return float(model(input_ids=rows, labels=rows).loss)

    def after(**given: Any) -> tuple[float, Any]:
        model = transformers.AutoModelForCausalLM.from_pretrained(STORIES).float()
        recipe = Recipe(**given, heldout=0)
        report = compress(model, None, recipe, Runtime(progress=False), data)
        return loss(model), report

    found, report = after(method="depth_loss", blocks=1)
    every = []
    for index in range(5):
        model = transformers.AutoModelForCausalLM.from_pretrained(STORIES).float()
        delete_blocks(model, engine.find_blocks(model), [index])
        every.append(loss(model))
    assert numbers(report) == [every.index(min(every))]
    assert found == pytest.approx(min(every), rel=1e-4)
    base = [row["value"] for row in report.structure["ranking"]]
    assert [b - base[0] for b in base] == pytest.approx(
        [e - every[0] for e in every], rel=1e-3, abs=1e-4
    )
    recovered, _ = after(method="depth_loss", blocks=1, update="lowrank?rank=16")
    assert recovered < found
