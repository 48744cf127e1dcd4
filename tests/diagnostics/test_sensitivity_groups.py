"""All but one part, and only one: against brute force, and planted parts that have to be named."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lm_calib_plugin import compress, engine
from lm_calib_plugin.diagnostics.sensitivity import (
    Compressed,
    Group,
    Judge,
    block_groups,
    component_groups,
    compress_twin,
    probe_groups,
)
from lm_calib_plugin.diagnostics.sensitivity.groups_shown import groups_findings
from lm_calib_plugin.diagnostics.sensitivity.parts import chosen_layers
from lm_calib_plugin.diagnostics.sensitivity.variants import EXCHANGED
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import Recipe
from tests.diagnostics.sensitive import QUIET, RTN, assert_same, judge, state, text_file, trained
from tests.tiny import make_model, make_tokenizer, random_ids


def parts_of(model: Any) -> tuple[list[engine.TargetLayer], engine.Blocks]:
    blocks = engine.find_blocks(model)
    return engine.find_layers(blocks)[0], blocks


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama",
            {
                "self_attn.q_proj": "q",
                "self_attn.k_proj": "k",
                "self_attn.v_proj": "v",
                "self_attn.o_proj": "o",
                "mlp.gate_proj": "gate",
                "mlp.up_proj": "up",
                "mlp.down_proj": "down",
            },
        ),
        (
            "gpt2",
            {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
        ),
        (
            "opt",
            {
                "self_attn.q_proj": "q",
                "self_attn.k_proj": "k",
                "self_attn.v_proj": "v",
                "self_attn.out_proj": "o",
                "fc1": "up",
                "fc2": "down",
            },
        ),
        (
            "qwen3_moe",
            {
                "self_attn.q_proj": "q",
                "self_attn.k_proj": "k",
                "self_attn.v_proj": "v",
                "self_attn.o_proj": "o",
                "mlp.experts.gate_up_proj": "gate_up",
                "mlp.experts.down_proj": "down",
            },
        ),
    ],
)
def test_parts_are_found_by_name(name: str, expected: dict[str, str]) -> None:
    layers, blocks = parts_of(make_model(name))
    groups = component_groups(layers, blocks)
    components = {g.name: g for g in groups if g.kind == "component"}
    assert {n: g.role for n, g in components.items()} == expected
    assert sorted(x for g in components.values() for x in g.layers) == sorted(
        x.name for x in layers
    )
    halves = {g.name: set(g.layers) for g in groups if g.kind == "half"}
    first = [n for n in expected if "attn" in n]
    assert halves["attention"] == {x for n in first for x in components[n].layers}
    assert halves["mlp"] == {x.name for x in layers} - halves["attention"]
    ends = {g.name: g.layers for g in groups if g.kind == "end"}
    assert set(ends) == {"first block", "last block"}
    assert all(f"{blocks.path}.2." in x for x in ends["last block"])
    assert [g.name for g in block_groups(layers, blocks)] == ["block 0", "block 1", "block 2"]


def test_what_is_everything_is_no_part() -> None:
    layers, blocks = parts_of(make_model())
    one = [x for x in layers if x.name.endswith("q_proj")]
    assert [g.name for g in component_groups(one, blocks)] == ["first block", "last block"]
    assert [g.name for g in component_groups(layers, blocks, ends=2) if g.kind == "end"] == [
        "first 2 blocks",
        "last 2 blocks",
    ]
    with pytest.raises(UserError, match="one part of the model"):
        block_groups(one[:1], blocks)


def test_layers_are_chosen_by_words_and_patterns() -> None:
    layers, blocks = parts_of(make_model())
    assert len(chosen_layers(("attention",), layers, blocks)) == 12
    assert len(chosen_layers(("mlp", "q_proj"), layers, blocks)) == 12
    with pytest.raises(UserError, match=r"0 of 21 layers.*did you mean `down_proj`"):
        chosen_layers(("down_prj",), layers, blocks)


RECIPES = {
    "rtn": {"method": "rtn", "bits": 3, "group_size": 8},
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "gptq_dense": {"method": "gptq", "bits": 3, "group_size": 8, "propagate": "dense"},
    "wanda_dense": {"method": "wanda", "sparsity": 0.5, "propagate": "dense"},
}


def run(name: str, given: dict[str, Any], folder: Path) -> tuple[Any, Compressed]:
    model = make_model(name)
    if Recipe(**given).needs_data:
        given = {**given, "calibration": text_file(folder), "nsamples": 6, "seqlen": 16}
    return model, compress_twin(model, make_tokenizer(), Recipe(**given), QUIET)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_exchanged_is_recompressed(name: str, recipe: str, tmp_path: Path) -> None:
    """Data-free, or calibrated on the dense model: both ways give the same bits."""
    model, run_of = run(name, RECIPES[recipe], tmp_path)
    before = state(model)
    assert run_of.how == EXCHANGED
    names = {x.name for x in run_of.layers}
    for group in component_groups(run_of.layers, run_of.blocks)[::3]:
        for chosen in (names - set(group.layers), set(group.layers)):
            exchanged = state(run_of.variant(chosen))
            assert_same(exchanged, run_of.variant(chosen, anew=True))
            by_name = {x.name: x for x in parts_of(model)[0]}
            for x in run_of.weights.layers if run_of.weights else []:
                same = torch.equal(x.weight, by_name[x.name].weight)
                assert same != (x.name in chosen)
    assert_same(before, model)


def test_half_of_the_experts_of_a_parameter(tmp_path: Path) -> None:
    """Single experts of one tensor can be dense beside others that are compressed."""
    _, run_of = run("qwen3_moe", RECIPES["rtn"], tmp_path)
    chosen = {x.name for x in run_of.layers if ".experts.1." in x.name}
    assert_same(state(run_of.variant(chosen)), run_of.variant(chosen, anew=True))


def test_biases_are_exchanged_with_their_weights(tmp_path: Path) -> None:
    given = {"method": "wanda", "sparsity": 0.5, "update": "bias", "propagate": "dense"}
    model, run_of = run("opt", given, tmp_path)
    assert run_of.how == EXCHANGED
    group = component_groups(run_of.layers, run_of.blocks)[5]
    work = run_of.variant(set(group.layers))
    for (name, one), other in zip(work.named_parameters(), model.parameters(), strict=True):
        mine = name.removesuffix(".weight").removesuffix(".bias") in group.layers
        assert torch.equal(one, other) != mine, name
    assert_same(state(work), run_of.variant(set(group.layers), anew=True))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"method": "awq", "bits": 3, "group_size": 8}, "transform"),
        ({"method": "rtn", "scheme": "W8A8"}, "inputs of its layers"),
        ({"method": "rtn", "bits": 3, "group_size": 8, "kv_bits": 8}, "cached keys"),
    ],
)
def test_what_is_more_than_weights_is_compressed_anew(
    given: dict[str, Any], why: str, tmp_path: Path
) -> None:
    model, run_of = run("llama", given, tmp_path)
    before = state(model)
    assert why in run_of.how
    group = Group("q", "component", tuple(x.name for x in run_of.layers if "q_proj" in x.name))
    result = probe_groups(run_of, judge(), [group], progress=False)
    other = copy.deepcopy(model)
    recipe = run_of.recipe.replaced(targets=group.layers)
    compress(other, None, recipe, QUIET, run_of.report.calibration_set)
    assert result.rows[0].alone.tolist() == judge().score(other).tolist()
    assert_same(before, model)


def test_overrides_that_mean_nothing_in_a_part_are_left_out(tmp_path: Path) -> None:
    given = {**RECIPES["rtn"], "overrides": {"*down_proj": {"bits": 2}, "*0.*": {"bits": 5}}}
    _, run_of = run("llama", given, tmp_path)
    chosen = {x.name for x in run_of.layers if "layers.1.self_attn.q" in x.name}
    assert_same(state(run_of.variant(chosen)), run_of.variant(chosen, anew=True))


@pytest.mark.parametrize("anew", [False, True])
def test_recovery_is_that_of_brute_force(anew: bool) -> None:
    model = make_model()
    run_of = compress_twin(model, None, RTN, QUIET)
    groups = component_groups(run_of.layers, run_of.blocks)
    found = probe_groups(run_of, judge(), groups, recompress=anew, progress=False)

    def loss(**changes: Any) -> float:
        """Nats per token, by transformers' own loss."""
        other = copy.deepcopy(model)
        if changes.pop("dense", None) is None:
            compress(other, None, RTN.replaced(**changes), QUIET)
        losses = [float(other(i[None], labels=i[None]).loss) * (len(i) - 1) for i in ids]
        return sum(losses) / sum(len(i) - 1 for i in ids)

    ids = judge().sequences
    with torch.no_grad():
        dense, everything = loss(dense=True), loss()
        for name, row in (("self_attn.v_proj", found.rows[2]), ("attention", found.rows[7])):
            assert row.group.name == name
            pattern = "*self_attn*" if name == "attention" else name
            without, alone = loss(ignore=[pattern]), loss(targets=[pattern])
            whole = everything - dense
            assert row.recovery.value == pytest.approx((everything - without) / whole, rel=1e-3)
            assert row.damage.value == pytest.approx((alone - dense) / whole, rel=1e-3, abs=1e-4)
            assert row.increase_alone.value == pytest.approx(alone - dense, rel=1e-3, abs=1e-6)
    assert found.increase.value == pytest.approx(everything - dense, rel=1e-3)
    assert found.judge.perplexity(found.dense) == pytest.approx(math.exp(dense), rel=1e-5)


def test_a_planted_part_and_block_are_named() -> None:
    """Everything at 8 bits, one layer at 2: it carries the loss, alone and left out."""
    model, ids = trained()
    overrides = {"*layers.1.mlp.down_proj": {"bits": 2}}
    recipe = Recipe(method="rtn", bits=8, group_size=-1, overrides=overrides)
    run_of = compress_twin(model, None, recipe, QUIET)
    for groups, name in ((component_groups, "mlp.down_proj"), (block_groups, "block 1")):
        result = probe_groups(
            run_of, Judge(ids), groups(run_of.layers, run_of.blocks), progress=False
        )
        assert result.resolved
        own = {row.group.name: row for row in result.rows}
        for share in (own[name].recovery, own[name].damage):
            assert share.value == pytest.approx(1, abs=0.1)
            assert share.low is not None
            assert share.high is not None
            assert share.low <= share.value <= share.high
        sentences = groups_findings(result)
        assert any(f"leaving {name} dense" in sentence for sentence in sentences)
        if name == "mlp.down_proj":
            assert any(f"for its size {name} is worth most" in s for s in sentences)
        assert all(
            abs(row.recovery.value or 0) < 0.1 for n, row in own.items() if row.group.kind in
            ("component", "block") and n != name
        )  # fmt: skip


def test_a_ratio_over_nothing_has_no_interval() -> None:
    """A loss that is not told from 0 divides nothing: no bounds, and the findings say so."""
    bench = judge()
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 1, len(bench.sequences))
    share = bench.share(noise, noise[::-1])
    assert (share.low, share.high) == (None, None)
    assert "not resolved from 0" in share.words()
    assert bench.share(noise, noise * 0).value is None
    run_of = compress_twin(make_model(), None, RTN.replaced(bits=16), QUIET)
    groups = block_groups(run_of.layers, run_of.blocks)
    result = probe_groups(run_of, bench, groups, progress=False)
    assert not result.resolved
    assert "not told from 0" in groups_findings(result)[0]
    assert [row.recovery.value for row in result.rows] == [None] * 3


def test_an_interval_of_a_ratio_by_hand() -> None:
    """Each sequence loses twice as much in all as in a part: every resample says one half."""
    bench = judge()
    whole = np.arange(1.0, 1 + len(bench.sequences))
    share = bench.share(whole / 2, whole)
    assert share.value == pytest.approx(0.5)
    assert (share.low, share.high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert share.words() == "50 % [50, 50]"


def test_sequences_of_one_token_are_counted_and_left_out() -> None:
    bench = Judge(random_ids([5, 1, 6]))
    assert (len(bench.sequences), bench.left_out) == (2, 1)
    with pytest.raises(UserError, match="1 sequence"):
        Judge(random_ids([5, 1]))


def test_whole_parts_can_not_be_left_out() -> None:
    with pytest.raises(UserError, match="takes whole parts out"):
        compress_twin(make_model(), None, Recipe(method="shortgpt", blocks=1), QUIET)
