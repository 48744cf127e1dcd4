"""``CalibConfig``, ``CalibPruner``, ``CalibQuantizer`` and ``CalibModelForCausalLM``."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.configuration_utils import BaseConfig
from optimum.quantization_base import OptimumQuantizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AutoQuantizationConfig

from lm_calib_plugin import (
    CalibConfig,
    CalibModelForCausalLM,
    CalibPruneConfig,
    CalibPruner,
    CalibQuantizer,
    CalibrationSet,
    Recipe,
)
from lm_calib_plugin.engine import weights_digest
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.export.options import CALIB_CONFIG, FILES, REPORT, ExportOptions
from lm_calib_plugin.export.records import read_files_record, write_files_record
from lm_calib_plugin.integrations import compressors
from tests.tiny import make_model, make_tokenizer, random_ids, saved_model

DATA: dict[str, Any] = {"calibration": "random", "nsamples": 4, "seqlen": 16, "progress": False}
WANDA = {"method": "wanda", "sparsity": 0.5, **DATA}
DENSE_RTN = {"method": "rtn", "bits": 4, "group_size": 16, "export_format": "dense"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def exported(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    CalibPruner.from_pretrained(llama).prune(out, **WANDA)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


# --- CalibConfig


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "wanda", "sparsity": 0.5, "calibration": "self"},
        {"method": "magnitude", "pattern": "2:4", "export_format": "dense"},
        {"method": "gptq", "scheme": "W4A16", "overrides": {"*down_proj": {"bits": 8}}},
        {"method": "wanda", "sparsity": 0.1 + 0.2, "ignore": ["*q_proj"], "nsamples": 7},
        {"recipe": Recipe(method="rtn", bits=3)},
        {
            "method": "wanda",
            "sparsity": 0.5,
            "calibration": [{"source": "c4", "weight": 0.5}, {"source": "self", "weight": 0.5}],
        },
    ],
    ids=str,
)
def test_round_trip_is_exact(fields: dict[str, Any], tmp_path: Path) -> None:
    config = CalibConfig(**fields)
    assert isinstance(config, BaseConfig)
    config.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [CALIB_CONFIG]
    text = (tmp_path / CALIB_CONFIG).read_text()
    for again in (
        CalibConfig.from_pretrained(tmp_path),
        CalibConfig.from_dict(config.to_dict()),
        CalibConfig.from_json_file(str(tmp_path / CALIB_CONFIG)),
        copy.deepcopy(config),
    ):
        assert again == config
        assert again.recipe.to_metadata() == config.recipe.to_metadata()
        assert again.to_json_string() == text
    assert CalibConfig(method="rtn", bits=7) != config


def test_keywords_win_over_the_file(tmp_path: Path) -> None:
    CalibConfig(method="wanda", sparsity=0.5).save_pretrained(tmp_path)
    assert CalibConfig.from_pretrained(tmp_path, export_format="dense").export_format == "dense"
    config, left = CalibConfig.from_pretrained(tmp_path, return_unused_kwargs=True)
    assert (config.recipe.method, left) == ("wanda", {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"recipe": {"method": "wanda", "sparsity": 0.5}, "sparcity": 1},
            "did you mean `sparsity`",
        ),
        ({"recipe": {"method": "wanda", "sparsity": 0.5, "x": 1}}, "unknown argument `x`"),
        (
            {"recipe": {"method": "wanda", "sparsity": 0.5}, "configuration_files": ["/x"]},
            "unknown",
        ),
        ({"recipe": {"method": "wanda", "sparsity": 0.5}, "auto_map": {}}, "unknown"),
        (
            {"recipe": {"method": "wanda", "sparsity": 0.5}, "export_format": "gguf"},
            "allowed: auto",
        ),
        ({"recipe": "/etc/hostname"}, "recipe: a configuration holds '/etc/hostname'"),
        ({"recipe": ["wanda"]}, "recipe: a configuration holds"),
        ([], "holds no mapping"),
        ("{", "no calib_config.json in"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    content: Any, words: str, tmp_path: Path
) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / CALIB_CONFIG).write_text(text)
    with pytest.raises(UserError, match=words):
        CalibConfig.from_pretrained(tmp_path)


def test_a_file_can_not_make_other_files_be_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: wanda\nsparsity: 0.5\n")
    content = {"recipe": str(tmp_path / "r.yaml")}
    assert CalibConfig(**content).recipe.method == "wanda"  # typed by hand
    (tmp_path / CALIB_CONFIG).write_text(json.dumps(content))
    on_load = {"quant_method": "calib_prune", **content}
    for read in (
        lambda: CalibConfig.from_dict(content),
        lambda: CalibConfig.from_pretrained(tmp_path),
        lambda: CalibConfig.from_json_file(str(tmp_path / CALIB_CONFIG)),
        lambda: CalibPruneConfig.from_dict(on_load),
        lambda: AutoQuantizationConfig.from_dict(on_load),
    ):
        with pytest.raises(UserError, match=r"recipe: a configuration holds .*r\.yaml"):
            read()


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no calib_config.json in .* holds none"):
        CalibConfig.from_pretrained(tmp_path)


# --- CalibPruner, CalibQuantizer


def test_prune_and_load_back(llama: str, tmp_path: Path, capsys: Any) -> None:
    pruner = CalibPruner.from_pretrained(llama, dtype=torch.float32, device="cpu")
    assert isinstance(pruner, OptimumQuantizer)
    report = pruner.prune(tmp_path / "out", **WANDA)
    assert report.weights_digest == weights_digest(pruner.model)
    assert pruner.exported.folder == tmp_path / "out"
    assert CalibConfig.from_pretrained(tmp_path / "out") == pruner.config
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), logits(pruner.model))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(make_tokenizer())
    told = capsys.readouterr().err
    assert "lm-calib: wanda: 21 layers, 50.00% removed" in told
    assert "lm-calib: exported to" in told


def test_a_name_can_be_compressed_again_from_the_dense_model(llama: str) -> None:
    quantizer = CalibQuantizer.from_pretrained(llama)
    first = quantizer.quantize(method="rtn", bits=4, group_size=16)
    quantizer.quantize(method="rtn", bits=2, group_size=16)
    again = quantizer.quantize(method="rtn", bits=4, group_size=16)
    assert first.weights_digest == again.weights_digest
    assert first.key == again.key


def test_a_model_in_memory_is_compressed_in_place_and_once() -> None:
    model = make_model()
    pruner = CalibPruner.from_pretrained(model, make_tokenizer())
    report = pruner.prune(**WANDA)
    assert pruner.model is model
    assert weights_digest(model) == report.weights_digest
    with pytest.raises(UserError, match="model: has been compressed already"):
        pruner.prune(**WANDA)


def test_a_refused_recipe_leaves_the_model_to_try_again() -> None:
    pruner = CalibPruner.from_pretrained(make_model(), make_tokenizer())
    with pytest.raises(UserError, match="seqlen"):
        pruner.prune(**{**WANDA, "seqlen": 4096})
    pruner.prune(**WANDA)


def test_sets_expressions_and_configurations(llama: str) -> None:
    ids = random_ids([16] * 4)
    given = CalibrationSet.of([i.tolist() for i in ids], seqlen=16)
    config = CalibConfig(method="wanda", sparsity=0.5, calibration="self", seqlen=16, nsamples=4)
    pruner = CalibPruner.from_pretrained(llama)
    assert pruner.prune(calibration=given, config=config).calibration["calib_id"] == given.calib_id
    nested = [{"source": "random", "weight": 0.5}, {"source": "null:random", "weight": 0.5}]
    report = pruner.prune(calibration=nested, config=config)
    assert [s["source"] for s in report.calibration["sources"]] == ["random", "null:random"]
    with pytest.raises(UserError, match="sparsity: got 0.6 as an argument and 0.5"):
        pruner.prune(config=config, sparsity=0.6)


def test_nothing_is_loaded_before_everything_is_valid(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("loaded too early")

    monkeypatch.setattr(compressors, "load_weights", never)
    monkeypatch.setattr(compressors, "load_tokenizer", never)
    (tmp_path / "taken").mkdir()
    pruner = CalibPruner.from_pretrained(llama)
    quantizer = CalibQuantizer.from_pretrained(llama)
    wrong = [
        (lambda: pruner.prune(method="gptq", bits=4), "use CalibQuantizer"),
        (lambda: quantizer.quantize(method="wanda", sparsity=0.5), "use CalibPruner"),
        (lambda: pruner.quantize(method="gptq"), "use CalibQuantizer"),
        (lambda: quantizer.prune(method="wanda"), "use CalibPruner"),
        (lambda: pruner.prune(method="wanda", sparsty=0.5), "did you mean `sparsity`"),
        (lambda: pruner.prune(tmp_path / "taken", **WANDA), "save_dir: .* exists"),
        (lambda: pruner.prune(tmp_path / "o", **WANDA, export_format="zip"), "export_format"),
        (
            lambda: pruner.prune(tmp_path / "o", **WANDA, export_format="compressed-tensors"),
            "export_format",
        ),
        (lambda: pruner.prune(**WANDA, overwrite=True), "overwrite: given without save_dir"),
        (
            lambda: quantizer.quantize(tmp_path / "o", method="rtn", bits=8, kv_bits=8),
            "kv_bits",
        ),
        (lambda: pruner.prune(config={"method": "wanda"}), "config: got a dict"),
        (lambda: pruner.prune(**{**WANDA, "calibration": "file:no.txt"}), "no.txt"),
    ]
    for do, words in wrong:
        with pytest.raises(UserError, match=words):
            do()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_options_of_an_export_are_all_known() -> None:
    own = {name.removeprefix("export_") for name in compressors._OPTIONS}
    assert own == set(ExportOptions.__dataclass_fields__)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(UserError, match="`no/such` cannot be loaded|none was found for `no/such`"):
        CalibPruner.from_pretrained("no/such").prune(**WANDA)


# --- CalibModelForCausalLM


def test_what_comes_out_is_an_ordinary_model(
    exported: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lm_calib_plugin"):
        model = CalibModelForCausalLM.from_pretrained(exported)
    plain = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model) is type(plain)
    assert set(vars(model)) - set(vars(plain)) == {"calib_config", "calib_report"}
    assert torch.equal(logits(model), logits(plain))
    assert model.calib_config.recipe.method == "wanda"
    assert model.calib_report["achieved"]["sparsity"] == 0.5
    (line,) = [t for t in capsys.readouterr().err.splitlines() if t.startswith("lm-calib:")]
    calib_id = model.calib_report["calibration"]["calib_id"]
    for words in ("wanda", "50.00% removed", calib_id[:12], "format dense", "were evaluated"):
        assert words in line
    assert "were evaluated" in caplog.text
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("llama_tied", "prune", {**WANDA}),
        ("gpt2", "prune", {"method": "magnitude", "sparsity": 0.5}),
        ("qwen3_moe", "prune", {"method": "magnitude", "sparsity": 0.5}),
        ("llama", "prune", {"method": "shortgpt", "blocks": 1, **DATA}),
        ("llama", "prune", {"method": "flap", "sparsity": 0.3, **DATA}),
        ("llama_tied", "quantize", DENSE_RTN),
    ],
    ids=str,
)
def test_weights_are_found_to_be_those_evaluated(
    name: str, kind: str, fields: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    folder = saved_model(tmp_path / "base", name)
    class_ = CalibPruner if kind == "prune" else CalibQuantizer
    compressor = class_.from_pretrained(folder)
    getattr(compressor, kind)(tmp_path / "out", **fields)
    model = CalibModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "weights are those that were evaluated" in capsys.readouterr().err
    assert torch.equal(logits(model), logits(compressor.model))


def test_another_dtype_says_so(exported: Path, capsys: Any) -> None:
    model = CalibModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert "cast to torch.bfloat16" in capsys.readouterr().err


def copied(exported: Path, to: Path) -> Path:
    to.mkdir()
    for file in exported.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_every_changed_file_is_noticed(exported: Path, tmp_path: Path) -> None:
    # The card is for people to write on.
    files = sorted(p.name for p in exported.iterdir() if p.name != "README.md")
    for number, name in enumerate(files):
        folder = copied(exported, tmp_path / str(number))
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))
        with pytest.raises(CalibError, match=name.replace(".", r"\.")):
            CalibModelForCausalLM.from_pretrained(folder)


def test_weights_that_load_as_others_are_noticed(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are right; what the library makes of them is not."""
    real = AutoModelForCausalLM.from_pretrained

    def shifted(*args: Any, **kwargs: Any) -> Any:
        model = real(*args, **kwargs)
        with torch.no_grad():
            weight = model.model.layers[1].mlp.up_proj.weight
            weight[weight != 0] += 1e-3
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", shifted)
    with pytest.raises(CalibError, match="not those that were evaluated: their digest"):
        CalibModelForCausalLM.from_pretrained(exported)


def test_a_record_of_another_model_is_noticed(exported: Path, tmp_path: Path) -> None:
    """A list of files that is consistent, but tells of other weights."""
    folder = copied(exported, tmp_path / "forged")
    facts = dict(read_files_record(folder).facts)
    (folder / FILES).unlink()
    write_files_record(folder, facts | {"weights_digest": "0" * 64})
    with pytest.raises(CalibError, match="their digest is not 000000000000"):
        CalibModelForCausalLM.from_pretrained(folder)
    report = json.loads((folder / REPORT).read_text())
    report["table"]["layers"][3]["removed"] = 0.25
    (folder / REPORT).write_text(json.dumps(report))
    (folder / FILES).unlink()
    write_files_record(folder, facts)
    with pytest.raises(CalibError, match="zeros, and the report says"):
        CalibModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_zeros_that_an_export_added_are_told_from_those_of_the_model(
    name: str, tmp_path: Path
) -> None:
    """Fresh biases are all zero, and those are part of what was evaluated."""
    base, out = tmp_path / "base", tmp_path / "out"
    model = make_model(name, **({"attention_bias": True} if name == "llama" else {}))
    biases = {n for n, p in model.named_parameters() if n.endswith("bias") and not p.any()}
    assert biases
    model.save_pretrained(base), make_tokenizer().save_pretrained(base)
    pruner = CalibPruner.from_pretrained(str(base))
    pruner.prune(out, method="flap", sparsity=0.3, **DATA)
    plain = AutoModelForCausalLM.from_pretrained(out)
    names = {n for n, _ in plain.named_parameters()} - {
        n for n, _ in pruner.model.named_parameters()
    }
    assert bool(names) == (name == "llama")
    facts = {**read_files_record(out).facts, "added": sorted(names)}

    def record(**changes: Any) -> None:
        (out / FILES).unlink()
        write_files_record(out, facts | changes)

    record()
    assert torch.equal(logits(CalibModelForCausalLM.from_pretrained(out)), logits(pruner.model))
    # A zero bias of the model itself is one of its weights.
    record(added=sorted(names | {min(biases)}))
    with pytest.raises(CalibError, match="their digest is not"):
        CalibModelForCausalLM.from_pretrained(out)
    for wrong in (
        ["model.nothing.bias"],
        [next(n for n, p in plain.named_parameters() if p.any())],
    ):
        record(added=wrong)
        with pytest.raises(CalibError, match="was added as zeros"):
            CalibModelForCausalLM.from_pretrained(out)


def test_other_folders_say_what_to_type(llama: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no exported folder.*AutoModelForCausalLM.from_pretrained"
    ):
        CalibModelForCausalLM.from_pretrained(llama)
    with pytest.raises(UserError, match="no folder"):
        CalibModelForCausalLM.from_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match="none could be had from the hub"):
        CalibModelForCausalLM.from_pretrained("no/such")
    with pytest.raises(UserError, match="from_pretrained"):
        CalibModelForCausalLM()


def test_hub_names_are_downloaded_whole(
    exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def download(name: str, **kwargs: Any) -> str:
        asked.append((name, kwargs))
        return str(exported)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    model = CalibModelForCausalLM.from_pretrained("me/pruned", revision="abc", device_map="cpu")
    assert asked == [("me/pruned", {"revision": "abc"})]
    assert model.calib_report["key"]
