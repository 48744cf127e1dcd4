"""Which layers are compressed, and how the choice is refused when it makes no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress, compression, engine
from lm_calib_plugin.errors import UnsupportedModelError, UserError
from tests.tiny import make_model, make_tokenizer, random_ids

QUIET = Runtime(progress=False)


def names(model: object, **options: object) -> list[str]:
    recipe = Recipe(method="magnitude", sparsity=0.5, **options)
    blocks = engine.find_blocks(model, recipe.blocks)
    layers, _ = engine.select_layers(model, blocks, recipe.targets, recipe.ignore, recipe.untie)
    return [layer.name for layer in layers]


def test_default_is_every_linear_layer_of_the_blocks_and_never_the_head() -> None:
    found = names(make_model())
    assert len(found) == 21
    assert all(name.startswith("model.layers.") for name in found)


def test_patterns_match_whole_names_and_tails() -> None:
    model = make_model()
    assert len(names(model, targets="q_proj+k_proj")) == 6
    assert len(names(model, targets="*mlp*")) == 9
    assert len(names(model, targets="model.layers.0.*")) == 7
    assert len(names(model, ignore="model.layers.0.*+down_proj")) == 12


def test_a_pattern_without_match_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"`\*\.query` matched 0 of 21 linear layers.*q_proj"):
        names(make_model(), targets="*.query")
    with pytest.raises(UserError, match="ignore.*matched 0.*did you mean `down_proj`"):
        names(make_model(), ignore="down_prj")
    with pytest.raises(UserError, match="exclude every layer"):
        names(make_model(), ignore="*")
    with pytest.raises(UserError, match="embedding table"):
        names(make_model(), targets="embed_tokens")


def test_the_head_can_be_named() -> None:
    model = make_model("llama")
    calibration = CalibrationSet.of(random_ids([16] * 4), seqlen=16)
    recipe = Recipe(method="wanda", sparsity=0.5, targets="lm_head", heldout=0)
    dense = make_model("llama")
    rows: list[torch.Tensor] = []
    hook = dense.lm_head.register_forward_pre_hook(lambda _m, args: rows.append(args[0][0]))
    with torch.no_grad():
        for ids in random_ids([16] * 4):
            dense(input_ids=ids[None])
    hook.remove()
    report = compress(model, None, recipe, QUIET, calibration)
    assert [row.name for row in report.layers] == ["lm_head"]
    scores = dense.lm_head.weight.double().abs() * torch.cat(rows).double().square().sum(0).sqrt()
    cut = scores.sort(dim=1).values[:, 16:17]
    assert torch.equal(model.lm_head.weight != 0, scores >= cut)


def test_a_tied_head_is_refused_unless_untied() -> None:
    model = make_model("llama_tied")
    with pytest.raises(UserError, match="share one tensor.*untie=true"):
        names(model, targets="lm_head")
    recipe = Recipe(method="magnitude", sparsity=0.5, targets="lm_head+*proj", untie=True)
    before = model.model.embed_tokens.weight.detach().clone()
    refused = Recipe(method="rtn", group_size=100, targets="lm_head", untie=True)
    with pytest.raises(UserError, match="group_size"):
        compress(model, None, refused, QUIET)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    report = compress(model, None, recipe, QUIET)
    assert len(report.layers) == 22
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert int((model.lm_head.weight == 0).sum()) == model.lm_head.weight.numel() // 2
    model.tie_weights()
    assert int((model.lm_head.weight == 0).sum()) == model.lm_head.weight.numel() // 2


@pytest.mark.parametrize("reason", ["text", "ids", "interrupt"])
def test_a_head_stays_tied_when_nothing_was_done(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama_tied")
    (tmp_path / "short.txt").write_text("the of")
    source = {"calibration": f"file:{tmp_path / 'short.txt'}", "nsamples": 64, "seqlen": 64}
    base = {"method": "wanda", "sparsity": 0.5, "targets": "lm_head+*proj", "untie": True}
    recipe = Recipe(**base)
    given = CalibrationSet.of([torch.tensor([5, 200])], seqlen=8)
    before = engine.model_digest(model)
    if reason == "text":
        with pytest.raises(UserError):
            compress(model, make_tokenizer(), Recipe(**base, **source), QUIET)
    elif reason == "ids":
        with pytest.raises(UserError, match="token id 200 >= 97 rows"):
            compress(model, None, recipe, QUIET, given)
    else:
        monkeypatch.setattr(compression, "draw", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress(model, make_tokenizer(), recipe, QUIET)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert engine.model_digest(model) == before


def _interrupt(*given: object) -> None:
    raise KeyboardInterrupt


def test_routers_stay_dense_unless_named() -> None:
    model = make_model("qwen2_moe")
    assert not any(
        "gate" in n.rsplit(".", 1)[-1].split("_") for n in names(model) if "gate_" not in n
    )
    assert len(names(model, targets="shared_expert_gate")) == 3


def test_experts_stored_in_another_way_are_refused_by_name() -> None:
    config = transformers.JetMoeConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=4,
    )
    model = transformers.JetMoeForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="has 3 dimensions.*ignore="):
        names(model)
    with pytest.raises(UserError, match="names only matrices that are not linear"):
        names(make_model("mixtral"), targets="gate.weight")


def test_an_unsuitable_width_is_refused_by_name() -> None:
    model = make_model("llama", intermediate_size=50)
    with pytest.raises(UserError, match=r"down_proj has 50 inputs, not divisible by 4"):
        compress(model, None, Recipe(method="magnitude", pattern="2:4"), QUIET)
    with pytest.raises(UserError, match=r"group_size.*does not divide the 32 inputs"):
        compress(model, None, Recipe(method="rtn", group_size=128), QUIET)


def test_models_of_another_kind_are_refused_by_name() -> None:
    recipe = Recipe(method="magnitude", sparsity=0.5)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder"):
        compress(t5, None, recipe, QUIET)
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        compress(mamba, None, recipe, QUIET)
    with torch.device("meta"):
        empty = make_model()
    with pytest.raises(UnsupportedModelError, match="no data"):
        compress(empty, None, recipe, QUIET)
    quantized = make_model()
    quantized.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        compress(quantized, None, recipe, QUIET)
    with pytest.raises(UnsupportedModelError, match="no list of blocks at `model.blocks`.*layers"):
        compress(
            make_model(), None, Recipe(method="magnitude", sparsity=0.5, block_path="model.blocks")
        )


def test_adapters_have_to_be_merged() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        compress(model, None, Recipe(method="magnitude", sparsity=0.5), QUIET)
