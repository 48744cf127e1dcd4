"""What was evaluated is what is in the folder: for every family, loaded without this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lm_calib_plugin as lm_calib
from lm_calib_plugin.errors import CalibError, UnsupportedModelError, UserError
from lm_calib_plugin.export.folder import ExportResult, check_out, export_model
from lm_calib_plugin.export.formats import check_export, check_model
from lm_calib_plugin.export.options import ExportOptions
from tests.export.strangers import logits_elsewhere, probe
from tests.tiny import ARCHITECTURES, make_model, make_tokenizer

DATA = {"calibration": "random", "nsamples": 20, "seqlen": 16}
WANDA = {"method": "wanda", "sparsity": 0.5}
# name -> (architecture, recipe, format)
ASYMMETRIC = {"method": "rtn", "bits": 3, "symmetric": False, "group_size": 16}
JOINT = {"method": "sparsegpt+gptq", "sparsity": 0.5, "bits": 4, "group_size": 16}
DENSE: dict[str, tuple[str, dict[str, Any], str]] = {
    "magnitude": ("llama", {"method": "magnitude", "pattern": "2:4"}, "auto"),
    "wanda": ("llama_tied", WANDA, "auto"),
    "dsnot": ("qwen3", {"method": "dsnot", "sparsity": 0.5}, "auto"),
    "sparsegpt": ("qwen2", {"method": "sparsegpt", "sparsity": 0.5}, "auto"),
    "owl": ("llama", {"method": "owl", "sparsity": 0.6}, "auto"),
    "swap_pcg": ("llama", {"method": "swap_pcg", "sparsity": 0.6}, "auto"),
    "head": ("llama_tied", {**WANDA, "targets": "lm_head+mlp.*", "untie": True}, "auto"),
    "flap": ("llama", {"method": "flap", "sparsity": 0.3}, "auto"),
    "flap_biased": ("opt", {"method": "flap", "sparsity": 0.3}, "auto"),
    "asymmetric": ("llama", ASYMMETRIC, "dense"),
    "hqq": ("llama", {"method": "hqq", "bits": 3, "group_size": 16}, "dense"),
    "gptq": ("gpt2", {"method": "gptq", "bits": 4, "group_size": 16}, "dense"),
    "experts": ("mixtral", {"method": "gptq", "bits": 4, "group_size": 8}, "dense"),
    "rotation": ("llama_tied", {"method": "rotation", "bits": 16}, "auto"),
    "joint": ("llama", JOINT, "dense"),
    "bfloat16": ("llama", WANDA, "auto"),
}
GROUPS = {"bits": 4, "group_size": 16}
AUTO = {"method": "gptq", "bits": "auto:4.5", "group_size": 16}
MIXED = {
    "method": "rtn",
    **GROUPS,
    "overrides": {"*down_proj": {"bits": 8}, "*o_proj": {"bits": 16}},
}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("llama", {"method": "rtn", **GROUPS}),
    "gptq_w3": ("llama_tied", {"method": "gptq", "bits": 3, "group_size": 16}),
    "gptq_w2": ("llama", {"method": "gptq", "bits": 2, "group_size": -1}),
    "autoround": ("llama", {"method": "autoround", "bits": 3, "group_size": 16}),
    "awq": ("qwen2", {"method": "awq", **GROUPS}),
    "rotation": ("llama_tied", {"method": "rotation", **GROUPS}),
    "auto": ("llama", AUTO),
    "mixed": ("llama", MIXED),
    "head": ("llama_tied", {"method": "rtn", **GROUPS, "targets": "lm_head+mlp.*", "untie": True}),
    "joint": ("llama", JOINT),
    "W8A8": ("qwen3", {"method": "rtn", "scheme": "W8A8"}),
    "W8A8_static": ("gemma3", {"method": "rtn", "scheme": "W8A8_static"}),
    "W8A8_static_opt": ("opt", {"method": "rtn", "scheme": "W8A8_static"}),
    "smoothquant": ("llama", {"method": "smoothquant", "scheme": "W8A8"}),
    "W4A8": ("llama", {"method": "rtn", "scheme": "W4A8", "group_size": 16}),
    "W4A4": ("llama", {"method": "gptq", "scheme": "W4A4"}),
    "FP8": ("phi3", {"method": "rtn", "scheme": "FP8"}),
    "FP8_static": ("llama_tied", {"method": "rtn", "scheme": "FP8_static"}),
    "neox": ("gpt_neox", {"method": "gptq", **GROUPS}),
    "bloom": ("bloom", {"method": "rtn", "scheme": "W8A8"}),
}
DENSE |= {f"wanda_{name}": (name, WANDA, "auto") for name in ARCHITECTURES}
DENSE |= {
    f"shortgpt_{name}": (name, {"method": "shortgpt", "blocks": 1}, "auto")
    for name in ARCHITECTURES
}


def export(
    folder: Path, architecture: str, recipe: dict[str, Any], stored: str = "auto", **changes: Any
) -> tuple[Any, lm_calib.Report, ExportResult]:
    model, tokenizer = make_model(architecture, **changes), make_tokenizer()
    made = lm_calib.Recipe(**{**DATA, **recipe})
    runtime = lm_calib.Runtime(progress=False)
    report = lm_calib.compress(model, tokenizer, made, runtime)
    done = export_model(model, tokenizer, made, report, folder, ExportOptions(format=stored))
    return model, report, done


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    """Return a model as `from_pretrained` makes it: rotary frequencies stay in float32."""
    from transformers import AutoModelForCausalLM

    make_model("llama").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def test_a_model_that_was_cast_in_memory_is_not_what_a_folder_gives(tmp_path: Path) -> None:
    model, tokenizer = make_model("llama").to(torch.bfloat16), make_tokenizer()
    recipe = lm_calib.Recipe(**DATA, **WANDA)
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
    with pytest.raises(CalibError, match="inv_freq is in bfloat16, and float32 in a loaded model"):
        export_model(model, tokenizer, recipe, report, tmp_path / "out")


def written(
    folder: Path, name: str, architecture: str, recipe: dict[str, Any], stored: str = "auto"
) -> tuple[Any, ExportResult]:
    """Compress and export one of the families above."""
    # Transformers gives some architectures a tokenizer of their own, whatever was stored.
    tokenizer = None if architecture.startswith(("qwen2", "gemma", "falcon")) else make_tokenizer()
    model = make_model(architecture)
    if name == "bfloat16":
        model = loaded(folder.with_name("base"), torch.bfloat16)
    made = lm_calib.Recipe(**{**DATA, **recipe})
    report = lm_calib.compress(model, make_tokenizer(), made, lm_calib.Runtime(progress=False))
    options = ExportOptions(format=stored)
    return model, export_model(model, tokenizer, made, report, folder, options)


@pytest.mark.parametrize(
    ("families", "stored"),
    [(DENSE, "dense"), (PACKED, "compressed-tensors")],
    ids=["dense", "packed"],
)
def test_every_family_is_loaded_elsewhere_as_it_was_evaluated(
    families: dict[str, Any], stored: str, tmp_path: Path
) -> None:
    expected, folders = {}, {}
    for name, family in families.items():
        folders[name] = tmp_path / name
        model, done = written(folders[name], name, *family)
        assert done.format == stored
        assert done.check is not None
        assert done.check["exact"], name
        with torch.no_grad():
            expected[name] = model(probe(), use_cache=False).logits.float()
    found = logits_elsewhere(folders, probe(), tmp_path / "logits.safetensors")
    for name, logits in expected.items():
        assert torch.equal(found[name], logits), name


def test_flat_inputs_are_refused_before_the_work() -> None:
    recipe = lm_calib.Recipe(method="rtn", scheme="W8A8")
    with pytest.raises(UserError, match=r"fc1 receives \[tokens, inputs\].*act_dynamic=false"):
        check_model(make_model("opt"), recipe)


def test_zeros_are_in_the_files_and_are_positive(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, report, _ = export(tmp_path / "out", "llama", WANDA)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for row in report.layers:
        weight = stored[f"{row.name}.weight"]
        assert float((weight == 0).float().mean()) == row.removed
        assert not torch.signbit(weight[weight == 0]).any()


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    import yaml

    _, report, _ = export(tmp_path / "out", "llama", {"method": "sparsegpt", "sparsity": 0.5})
    again = lm_calib.Recipe.from_model_args({"recipe": tmp_path / "out" / "recipe.yaml"})
    assert again == lm_calib.Recipe(**DATA, method="sparsegpt", sparsity=0.5)
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["key"] == report.key
    assert [row["name"] for row in told["table"]["layers"]] == [r.name for r in report.layers]
    record = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert record["calib_id"] == report.calibration["calib_id"]
    front = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert "lm-calib-plugin" in yaml.safe_load(front)["tags"]


def test_the_calibration_set_itself_on_request(tmp_path: Path) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    recipe = lm_calib.Recipe(**DATA, **WANDA)
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
    options = ExportOptions(keep_calibration=True)
    export_model(model, tokenizer, recipe, report, tmp_path / "out", options)
    again = lm_calib.Recipe(**WANDA, calibration=f"set:{tmp_path}/out/calibration")
    other = lm_calib.compress(
        make_model("llama"), tokenizer, again, lm_calib.Runtime(progress=False)
    )
    assert other.weights_digest == report.weights_digest
    assert other.key == report.key


def test_weights_are_cut_into_files_that_together_are_the_model(tmp_path: Path) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    recipe = lm_calib.Recipe(**DATA, **WANDA)
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
    options = ExportOptions(max_shard_size="30KB")
    done = export_model(model, tokenizer, recipe, report, tmp_path / "out", options)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert done.check is not None
    assert done.check["exact"]


def test_the_live_model_is_left_as_it_is(tmp_path: Path) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    recipe = lm_calib.Recipe(**DATA, **WANDA)
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
    before = model.config.to_dict(), model.generation_config.to_dict(), torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    export_model(model, tokenizer, recipe, report, tmp_path / "out")
    assert model.config.to_dict() == before[0]
    assert model.generation_config.to_dict() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_tokenizer_template_and_generation_settings_stay(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    model, tokenizer = make_model("llama"), make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    # Settings that contradict each other, as some published models have them.
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, False
    recipe = lm_calib.Recipe(**DATA, **WANDA)
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
    export_model(model, tokenizer, recipe, report, tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.3


def test_another_tokenizer_is_noticed(tmp_path: Path) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    recipe = lm_calib.Recipe(method="magnitude", sparsity=0.5)
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))

    class Other:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str) -> Any:
            return tokenizer(text.upper())

    with pytest.raises(CalibError, match="the tokenizer differs in the ids of a text"):
        export_model(model, Other(), recipe, report, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_lost_rounding_of_inputs_is_noticed_in_16_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences of logits can not tell: there the arithmetic differs as much."""
    from lm_calib_plugin.export import quantized

    monkeypatch.setattr(quantized, "_inputs", lambda *_: None)
    model, tokenizer = loaded(tmp_path / "base", torch.bfloat16), make_tokenizer()
    recipe = lm_calib.Recipe(method="rtn", scheme="W8A8")
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
    with pytest.raises(CalibError, match="rounds its inputs otherwise"):
        export_model(model, tokenizer, recipe, report, tmp_path / "out")


def test_a_model_in_training_is_compared_without_dropout(tmp_path: Path) -> None:
    model, tokenizer = make_model("gpt2"), make_tokenizer()
    recipe = lm_calib.Recipe(method="magnitude", sparsity=0.5)
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
    model.train()
    done = export_model(model, tokenizer, recipe, report, tmp_path / "out")
    assert done.check is not None
    assert done.check["exact"]
    assert all(module.training for module in model.modules())


def test_other_options_are_not_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, "llama", WANDA)
    with pytest.raises(UserError, match="exists"):
        export(out, "llama", WANDA, stored="dense")


def test_weights_changed_since_are_noticed(tmp_path: Path) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    recipe = lm_calib.Recipe(**DATA, **WANDA)
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(CalibError, match="have changed since"):
        export_model(model, tokenizer, recipe, report, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_same_model_is_not_written_twice_and_another_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, _, first = export(out, "llama", WANDA)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    _, _, second = export(out, "llama", WANDA)
    assert second.was_there
    assert second.bytes == first.bytes
    assert "nothing was written" in second.line()
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    other = lm_calib.Recipe(**DATA, method="wanda", sparsity=0.6)
    with pytest.raises(UserError, match="exists; a new folder"):
        check_out(out, other)
    check_out(out, other, overwrite=True)
    with pytest.raises(UserError, match="exists"):  # the same recipe on another model
        export(out, "llama", WANDA, vocab_size=101)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files, too"):
        check_out(out, other, overwrite=True)


def test_overwriting_replaces_an_export(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, "llama", WANDA)
    model, tokenizer = make_model("llama"), make_tokenizer()
    recipe = lm_calib.Recipe(**DATA, method="wanda", sparsity=0.25)
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
    export_model(model, tokenizer, recipe, report, out, ExportOptions(overwrite=True))
    assert json.loads((out / "report.json").read_text())["key"] == report.key
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("recipe", "asked", "message"),
    [
        ({**WANDA}, "compressed-tensors", "export_format=dense"),
        ({"method": "rtn", "bits": 4, "kv_bits": 8}, "auto", "export without kv_bits"),
        ({"method": "depth_loss", "blocks": 1, "sublayer": "mlp"}, "auto", "sublayer=block"),
        ({"method": "shortgpt", "blocks": 1, "update": "mean"}, "auto", "update=none"),
        ({"method": "rtn", "scheme": "W8A8"}, "dense", "compressed-tensors"),
        ({"method": "hqq", "bits": 4}, "auto", "export_format=dense"),
        ({"method": "rtn", "bits": 4, "symmetric": False}, "auto", "export_format=dense"),
    ],
    ids=str,
)
def test_what_no_format_holds_is_said_before_anything_is_loaded(
    recipe: dict[str, Any], asked: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_export(lm_calib.Recipe(**recipe), asked)


def test_biases_that_no_configuration_gives_are_refused_before_the_work() -> None:
    recipe = lm_calib.Recipe(method="flap", sparsity=0.3)
    with pytest.raises(UnsupportedModelError, match="a bias, and MistralForCausalLM has none"):
        check_model(make_model("mistral"), recipe)
    check_model(make_model("llama"), recipe)


@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
def test_a_folder_that_is_not_the_model_never_gets_its_name(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_calib_plugin.export import folder as writer

    def spoil(folder: Path) -> None:
        path = folder / part
        content = bytearray(path.read_bytes())
        if part == "config.json":
            content = bytearray(content.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 0.5'))
        else:
            content[-2] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(writer, "for_older_readers", spoil)
    with pytest.raises(CalibError, match="Nothing was kept"):
        export(tmp_path / "out", "llama", WANDA)
    assert not list(tmp_path.iterdir())


def test_frequencies_that_follow_the_length_of_a_text_are_not_compared(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model, tokenizer = make_model("llama", rope_parameters=rope), make_tokenizer()
    recipe = lm_calib.Recipe(method="magnitude", sparsity=0.5)
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
    with torch.no_grad():
        model(torch.arange(90)[None])  # longer than the 64 positions it was made for
    done = export_model(model, tokenizer, recipe, report, tmp_path / "out")
    assert done.check is not None
    assert done.check["exact"]


def test_levels_that_are_gone_are_missed(tmp_path: Path) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    recipe = lm_calib.Recipe(method="rtn", **GROUPS)
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
    report.grids = {}
    with pytest.raises(CalibError, match="no longer holds the levels"):
        export_model(model, tokenizer, recipe, report, tmp_path / "out")
