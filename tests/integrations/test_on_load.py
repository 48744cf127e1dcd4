"""``from_pretrained(M, quantization_config=...)``: compressed, and ordinary afterwards."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig

from lm_calib_plugin import CalibPruneConfig, CalibQuantConfig, Recipe, Runtime, compress
from lm_calib_plugin.engine import weights_digest
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.integrations import on_load
from tests.tiny import make_tokenizer, saved_model

DATA = {"calibration": "random", "nsamples": 4, "seqlen": 16}
GPTQ = {"method": "gptq", "bits": 4, "group_size": 16, **DATA}
FLAP = {"method": "flap", "sparsity": 0.3, **DATA}
CASES: list[tuple[str, type, dict[str, Any]]] = [
    ("llama", CalibPruneConfig, {"method": "wanda", "sparsity": 0.5, **DATA}),
    ("llama_tied", CalibPruneConfig, {"method": "magnitude", "pattern": "2:4"}),
    (
        "llama_tied",
        CalibPruneConfig,
        {"method": "magnitude", "sparsity": 0.5, "untie": True, "targets": "*proj+lm_head"},
    ),
    ("gpt2", CalibPruneConfig, {"method": "sparsegpt", "sparsity": 0.5, **DATA}),
    ("qwen3_moe", CalibPruneConfig, {"method": "magnitude", "sparsity": 0.3}),
    ("llama", CalibPruneConfig, {"method": "shortgpt", "blocks": 1, **DATA}),
    ("llama", CalibPruneConfig, FLAP),
    ("llama", CalibQuantConfig, GPTQ),
    ("llama_tied", CalibQuantConfig, {"method": "rtn", "bits": 4, "group_size": 8}),
    ("llama", CalibQuantConfig, {"method": "rtn", "scheme": "W8A8"}),
    ("llama", CalibQuantConfig, {"method": "rtn", "bits": 8, "group_size": 8, "kv_bits": 8}),
]
ROUNDED = [fields for _, kind, fields in CASES if {"scheme", "kv_bits"} & fields.keys()]
HELD = [*ROUNDED, FLAP]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    names = ("llama", "llama_tied", "gpt2", "qwen3_moe")
    return {name: saved_model(tmp_path_factory.mktemp(name), name) for name in names}


@pytest.fixture
def llama(folders: dict[str, str]) -> str:
    return folders["llama"]


def loaded(folder: str, config: Any = None, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


def pruned(folder: str, **kwargs: Any) -> Any:
    return loaded(folder, CalibPruneConfig(method="magnitude", sparsity=0.5), **kwargs)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize(("name", "kind", "fields"), CASES, ids=str)
def test_on_load_is_compress(
    folders: dict[str, str], name: str, kind: type, fields: dict[str, Any]
) -> None:
    model = loaded(folders[name], kind(**fields, progress=False))
    plain = loaded(folders[name])
    before = set(vars(plain)), plain.config.to_dict()
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    report = compress(plain, tokenizer, Recipe(**fields), Runtime(progress=False))
    assert weights_digest(model) == weights_digest(plain) == model.calib_report.weights_digest
    assert model.calib_report.key == report.key
    assert torch.equal(logits(model), logits(plain))
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    if fields not in HELD:
        assert set(vars(model)) - {"calib_report"} == set(vars(plain)) >= before[0]
        assert vars(model.config).keys() == vars(plain.config).keys()
        assert "calib" not in model.config.to_json_string()


@pytest.mark.parametrize(
    ("name", "kind", "fields"), [case for case in CASES if case[2] not in HELD], ids=str
)
def test_saved_models_are_plain(
    folders: dict[str, str], tmp_path: Path, name: str, kind: type, fields: dict[str, Any]
) -> None:
    model = loaded(folders[name], kind(**fields, progress=False))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("fields", ROUNDED, ids=str)
def test_what_is_rounded_while_running_is_not_saved(
    llama: str, tmp_path: Path, fields: dict[str, Any]
) -> None:
    model = loaded(llama, CalibQuantConfig(**fields))
    with pytest.raises(UserError, match=r"rounded while the model runs.*quantize\(save_dir=OUT"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not hasattr(model.config, "quantization_config")


def test_biases_that_no_configuration_tells_of_are_not_saved(llama: str, tmp_path: Path) -> None:
    model = loaded(llama, CalibPruneConfig(**FLAP))
    with pytest.raises(UserError, match=r"does not build the compressed model.*prune\(save_dir="):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["auto", torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device_map", [None, "auto", "cpu"])
def test_dtype_and_devices_are_those_of_a_plain_load(
    llama: str, dtype: Any, device_map: Any
) -> None:
    config = CalibPruneConfig(method="magnitude", sparsity=0)
    model = loaded(llama, config, dtype=dtype, device_map=device_map)
    plain = loaded(llama, dtype=dtype, device_map=device_map)
    assert weights_digest(model) == weights_digest(plain)
    assert model.dtype == plain.dtype
    assert model.device == plain.device


def test_twice_in_one_process(llama: str) -> None:
    config = CalibQuantConfig(**GPTQ)
    first, second = loaded(llama, config), loaded(llama, config)
    assert weights_digest(first) == weights_digest(second)
    on_load._register()
    assert {"calib_prune", "calib_quant"} <= AUTO_QUANTIZER_MAPPING.keys()
    third = loaded(llama, {**config.to_dict()})
    assert weights_digest(third) == weights_digest(first)


def test_the_cache_is_used(llama: str, tmp_path: Path) -> None:
    config = CalibPruneConfig(**CASES[0][2], cache=str(tmp_path / "kept"))
    first, second = loaded(llama, config), loaded(llama, config)
    assert weights_digest(first) == weights_digest(second)
    assert first.calib_report.key == second.calib_report.key
    assert (tmp_path / "kept").is_dir()
    assert "loaded" in second.calib_report.line()


def test_a_pipeline_generates(llama: str) -> None:
    model = pruned(llama)
    made = pipeline("text-generation", model=model, tokenizer=make_tokenizer())
    (answer,) = made("the of and", max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("the of and")


def test_a_pruned_model_can_be_trained(llama: str) -> None:
    model = pruned(llama).train()
    ids = torch.arange(3, 20)[None]
    model(ids, labels=ids).loss.backward()
    plain = {n for n, p in loaded(llama).named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == plain
    model.half().float()  # casts are allowed, as for any model


def test_global_random_state_is_untouched(llama: str) -> None:
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    loaded(llama, CalibQuantConfig(**{**GPTQ, "calibration": "self"}))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


def test_configurations_round_trip() -> None:
    config = CalibQuantConfig(
        method="gptq",
        bits=3,
        calibration=[{"source": "c4", "weight": 0.5}, {"source": "self", "weight": 0.5}],
        tokenizer="some/name",
        calib_batch_size=2,
    )
    plain = json.loads(config.to_json_string())
    for again in (CalibQuantConfig.from_dict(plain), AutoQuantizationConfig.from_dict(plain)):
        assert again == config
        assert again.recipe == config.recipe
        assert again.runtime.calib_batch_size == 2
        assert again.tokenizer == "some/name"
    assert config != CalibQuantConfig(method="gptq", bits=4)
    assert dict(config) == plain
    assert str(config.recipe.bits) in repr(config)


def test_a_tokenizer_in_memory_is_used_and_not_copied(tmp_path: Path) -> None:
    folder = saved_model(tmp_path)
    for file in Path(folder).glob("token*"):
        file.unlink()
    pruned(folder)  # needs no text, so no tokenizer is looked for
    fields = {"method": "wanda", "sparsity": 0.5, **DATA}
    with pytest.raises(UserError, match="tokenizer: none was found for"):
        loaded(folder, CalibPruneConfig(**fields))
    tokenizer = make_tokenizer()
    config = CalibPruneConfig(**fields, tokenizer=tokenizer)
    assert loaded(folder, config).calib_report.calibration["nsamples"] == 4
    assert config.tokenizer is tokenizer
    json.loads(config.to_json_string())


def other_tokenizer(folder: Path) -> None:
    """Write a tokenizer that gives the same words other numbers."""
    make_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    names = [word for word, number in words.items() if number >= 4]
    words |= dict(zip(names, reversed([words[name] for name in names]), strict=True))
    path.write_text(json.dumps(content))


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text("the of and to in a is that it was for on are as\n" * 40)
    data = {"calibration": f"file:{tmp_path / 'text.txt'}", "nsamples": 4, "seqlen": 16}
    return {"method": "wanda", "sparsity": 0.5, **data}


def drawn(model: Any) -> list[list[int]]:
    return [list(map(int, sequence)) for sequence in model.calib_report.calibration_set.sequences]


def test_the_tokenizer_of_a_subfolder_is_the_one_beside_the_weights(
    tmp_path: Path, text: dict[str, Any]
) -> None:
    inner = tmp_path / "repository" / "inner"
    saved_model(inner)
    other_tokenizer(inner.parent)
    config = CalibPruneConfig(**text)
    plain = drawn(loaded(str(inner), config))
    assert drawn(loaded(str(inner.parent), config, subfolder="inner")) == plain
    for file in inner.glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match="tokenizer: none was found for .*inner.*give tokenizer="):
        loaded(str(inner.parent), config, subfolder="inner")


@pytest.mark.parametrize("inside", ["", "inner"])
def test_the_tokenizer_of_a_revision_is_that_of_the_weights(
    tmp_path: Path, text: dict[str, Any], inside: str
) -> None:
    kept = tmp_path / "cache" / "models--someone--model"
    commits = {"main": "a" * 40, "older": "b" * 40}
    for name, commit in commits.items():
        saved_model(kept / "snapshots" / commit / inside)
        (kept / "refs").mkdir(exist_ok=True)
        (kept / "refs" / name).write_text(commit)
    other_tokenizer(kept / "snapshots" / commits["main"] / inside)
    config = CalibPruneConfig(**text)
    place = {"cache_dir": str(tmp_path / "cache"), "subfolder": inside}
    for name, commit in commits.items():
        plain = drawn(loaded(str(kept / "snapshots" / commit / inside), config))
        assert drawn(loaded("someone/model", config, revision=name, **place)) == plain


def test_the_tokenizer_is_looked_for_before_weights_are_loaded(
    tmp_path: Path, text: dict[str, Any]
) -> None:
    folder = saved_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="tokenizer: none was found for `/nowhere`"):
        loaded(folder, CalibPruneConfig(**text, tokenizer="/nowhere"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CalibPruneConfig(method="wanda", sparsty=0.5), "did you mean `sparsity`"),
        (lambda: CalibPruneConfig(method="wanda", sparsity=1.5), "fraction removed"),
        (lambda: CalibPruneConfig(method="gptq", bits=4), "use CalibQuantConfig"),
        (lambda: CalibQuantConfig(method="wanda", sparsity=0.5), "use CalibPruneConfig"),
        (lambda: CalibPruneConfig(method="wanda", sparsity=0.5, export_dir="x"), "export_dir"),
        (lambda: CalibPruneConfig(method="wanda", sparsity=0.5, calibration="slef"), "`self`"),
        (lambda: CalibPruneConfig(method="wanda", sparsity=0.5, calib_batch_size=0), ">= 1"),
        (lambda: CalibPruneConfig.from_dict({"quant_method": "gptq"}), "calib_prune"),
    ],
)
def test_mistakes_are_said_when_the_configuration_is_made(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize("named", ["calib_prune", "compressed-tensors"])
def test_checkpoints_that_name_a_quantization_are_refused(tmp_path: Path, named: str) -> None:
    folder = saved_model(tmp_path)
    path = tmp_path / "config.json"
    recipe = {"method": "magnitude", "sparsity": 0.5} if named == "calib_prune" else {}
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps(content | {"quantization_config": {"quant_method": named, **recipe}})
    )
    with pytest.raises(ValueError, match="config.json of the model|CompressedTensorsConfig"):
        pruned(folder)


def test_weights_on_disk_are_refused(llama: str, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "": "cpu"}
    with pytest.raises(UserError, match="device_map: all weights have to be in memory"):
        pruned(llama, device_map=places, offload_folder=str(tmp_path))
