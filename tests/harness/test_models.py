"""The harness model classes: arguments, results, caches, random state."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

import lm_calib_plugin  # noqa: F401 - makes the model names known
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.harness import Calib, CalibPruned, CalibQuantized
from lm_calib_plugin.harness.arguments import merge_harness, parse_argument_text, split_arguments
from tests.bank.corpora import write
from tests.tiny import ARCHITECTURES, make_model, make_tokenizer, saved_model

COMMON = {"calibration": "random", "nsamples": 10, "seqlen": 16, "progress": False}
ROWS = [
    {"q": f"the {a} of {b} is", "choices": [c, d], "gold": i % 2}
    for i, (a, b, c, d) in enumerate(
        zip("abcdefgh", "ijklmnop", "qrstuvwx", "hgfedcba", strict=True)
    )
]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A harness task in a YAML file, over a JSONL file beside it."""
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    content = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "tiny_choice.yaml").write_text(yaml.safe_dump(content))
    return folder


def evaluate(task: Path, model: str, arguments: Any, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(task), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["tiny_choice"],
        task_manager=manager,
        device="cpu",
        bootstrap_iters=0,
        **options,
    )


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_through_the_whole_path(name: str, task: Path, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", name)
    arguments = {"pretrained": folder, "method": "sparsegpt", "pattern": "2:4", **COMMON}
    results = evaluate(task, "calib_pruned", arguments)
    found = results["config"]["compression"]
    assert found["achieved"]["sparsity"] == 0.5
    assert found["layers"] == 3 * ARCHITECTURES[name][2]
    assert found["calibration"]["nsamples"] == 10
    assert found["error"]["heldout"]["median"] > 0
    json.dumps(found)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("calib_pruned", {"method": "magnitude", "sparsity": 0.5}),
        ("calib_pruned", {"method": "wanda", "sparsity": 0.5}),
        ("calib_pruned", {"method": "sparsegpt", "sparsity": 0.5}),
        ("calib_quantized", {"method": "rtn", "bits": 3, "group_size": 16}),
        ("calib_quantized", {"method": "gptq", "bits": 3, "group_size": 16}),
        ("calib", {"method": "gptq", "bits": 2, "group_size": -1, "symmetric": False}),
    ],
)
def test_every_method_reports_what_it_did(
    model: str, options: dict[str, Any], task: Path, tmp_path: Path
) -> None:
    folder = saved_model(tmp_path / "model")
    results = evaluate(task, model, {"pretrained": folder, **options, **COMMON})
    found = results["config"]["compression"]
    keys = "key recipe calibration achieved error seconds peak_memory_gib warnings versions"
    assert set(keys.split()) <= set(found)
    assert {"report_file", "report_sha256"} <= set(found)
    assert Path(found["report_file"]).is_file()
    assert found["recipe"]["method"] == options["method"]
    if model == "calib_pruned":
        assert found["achieved"]["sparsity"] == 0.5
    else:
        assert found["achieved"]["bits"] == options["bits"]
    assert "acc,none" in results["results"]["tiny_choice"]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "shortgpt", "blocks": 1, "update": "lowrank?rank=2"},
        {"method": "depth_loss", "sparsity": 0.7, "sublayer": "attention", "greedy": True},
        {"method": "flap", "sparsity": 0.3},
    ],
    ids=lambda o: o["method"],
)
def test_models_without_some_parts_are_evaluated(
    options: dict[str, Any], task: Path, tmp_path: Path
) -> None:
    folder = saved_model(tmp_path / "model")
    arguments = {"pretrained": folder, **options, **COMMON}
    results = evaluate(task, "calib_pruned", arguments)
    found = results["config"]["compression"]
    assert found["removed"]
    assert 0 < found["achieved"]["sparsity_model"] < found["achieved"]["sparsity_blocks"] < 1
    assert found["error"]["heldout"]["last_hidden"] > 0
    assert found["layers"] == 0
    side = json.loads(Path(found["report_file"]).read_text())
    assert side["structure"]["removed"] == found["removed"]
    assert len(side["structure"]["ranking"]) == (6 if options["method"] == "flap" else 3)
    json.dumps(found)
    assert "acc,none" in results["results"]["tiny_choice"]


def test_zero_strength_scores_like_the_dense_model(task: Path, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    dense = evaluate(task, "hf", {"pretrained": folder}, log_samples=True)
    none = evaluate(
        task,
        "calib_pruned",
        {"pretrained": folder, "method": "wanda", "sparsity": 0, **COMMON},
        log_samples=True,
    )
    for a, b in zip(dense["samples"]["tiny_choice"], none["samples"]["tiny_choice"], strict=True):
        assert a["resps"] == b["resps"]


def test_string_arguments_and_recipe_file(task: Path, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: wanda\nsparsity: 0.25\nnsamples: 4\nseqlen: 16\n")
    text = f"pretrained={folder},recipe={recipe},calibration=random,progress=False"
    found = evaluate(task, "calib_pruned", text)["config"]["compression"]
    assert found["achieved"]["sparsity"] == 0.25
    assert found["recipe"]["nsamples"] == 4


def test_a_mixture_in_the_argument_text(task: Path, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", num_hidden_layers=2)
    names = [write(tmp_path, kind) for kind in ("prose", "digits")]
    mixture = f"minimax({names[0]}+{names[1]})"
    text = (
        f"pretrained={folder},method=wanda,sparsity=0.5,nsamples=6,seqlen=12,"
        f"calibration={mixture},progress=False"
    )
    results = evaluate(task, "calib_pruned", text)
    plain = json.loads(json.dumps(results["config"]["compression"], allow_nan=False))
    found = plain["calibration"]["sources"][0]["mixture"]
    assert found["expression"] == mixture
    assert set(found["shares"]) == set(names)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-5)
    assert plain["calibration"]["nsamples"] == 6
    assert plain["recipe"]["calibration"] == mixture
    assert "mixture" not in plain["calibration"]["sources"][1]


def test_a_model_in_memory(task: Path) -> None:
    lm = CalibPruned(
        pretrained=make_model(), tokenizer=make_tokenizer(), method="wanda", sparsity=0.5, **COMMON
    )
    assert lm.report.achieved["sparsity"] == 0.5


def test_global_random_state_is_that_of_a_dense_run(tmp_path: Path) -> None:
    """Samples drawn after loading must not depend on compression."""
    folder = saved_model(tmp_path / "model")

    def draws(make: Any) -> list[Any]:
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        make()
        return [random.random(), np.random.rand(), torch.rand(1).item()]

    dense = draws(lambda: lm_eval.api.registry.get_model("hf")(pretrained=folder, device="cpu"))
    options = {"method": "sparsegpt", "sparsity": 0.5, **COMMON, "calibration": "self"}
    ours = draws(lambda: CalibPruned(pretrained=folder, device="cpu", **options))
    assert dense == ours


BAD = [
    ({"nsample": 8}, "unknown argument `nsample`; did you mean `nsamples`?"),
    ({"sparsty": 0.5}, "did you mean `sparsity`?"),
    ({"dtpye": "float32"}, "did you mean `dtype`?"),
    ({"method": "wnada"}, "did you mean `wanda`?"),
    ({"method": "gptq", "sparsity": None}, "use --model calib_quantized"),
    ({"sparsity": 50}, "for 50 % write 0.5"),
    ({"calibration": "file:/nowhere/x.jsonl"}, "calibration"),
    ({"calibration": "slef"}, "did you mean `self`?"),
    ({"calibration": "minimax(random)"}, "`minimax` takes 2 or more"),
    ({"calibration": "minimax(random+null:ascii)", "fold": "judge"}, "drop `fold`"),
    ({"gguf_file": "x.gguf"}, "gguf_file"),
    ({"tp_plan": "auto"}, "parallelize=True"),
    ({"load_in_4bit": True}, "another quantization"),
    ({"device_map": "auto"}, "parallelize=True"),
    ({"backend": "seq2seq"}, "decoder-only"),
    ({"calib_batch_size": 0}, "calib_batch_size"),
    ({"recipe": "/nowhere.yaml"}, "no file"),
    ({"report_dir": "/dev/null"}, "is a file"),
    ({"pretrained": None}, "pretrained: missing"),
    ({"pretrained": "builtin:smolm2"}, "builtin"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_arguments_load_nothing(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loaded(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.__init__", loaded)
    arguments = {"pretrained": "some/model", "method": "wanda", "sparsity": 0.5} | change
    with pytest.raises(UserError) as caught:
        CalibPruned.create_from_arg_obj(arguments)
    assert message in str(caught.value)
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_not_replaced_silently() -> None:
    with pytest.raises(UserError, match="no CUDA device was found"):
        CalibPruned.create_from_arg_obj(
            {"pretrained": "m", "method": "wanda", "sparsity": 0.5, "device": "cuda:0"}
        )


def test_too_long_sequences_fail_before_the_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = saved_model(tmp_path / "model")
    monkeypatch.setattr(
        "lm_eval.models.huggingface.HFLM._create_model",
        lambda *a, **k: pytest.fail("weights were read"),
    )
    with pytest.raises(UserError, match="seqlen: got 4096; the model accepts 64 positions"):
        CalibPruned(pretrained=folder, method="wanda", sparsity=0.5, seqlen=4096, device="cpu")


def test_response_cache_is_refused_to_another_recipe(task: Path, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    cache = str(tmp_path / "cache")
    base = {"pretrained": folder, "method": "magnitude"}
    first = evaluate(task, "calib_pruned", {**base, "sparsity": 0.5}, use_cache=cache)
    again = evaluate(task, "calib_pruned", {**base, "sparsity": 0.50}, use_cache=cache)
    assert first["results"] == again["results"]
    with pytest.raises(UserError, match=r"use_cache.*--use_cache cache/"):
        evaluate(task, "calib_pruned", {**base, "sparsity": 0.75}, use_cache=cache)
    dense_cache = str(tmp_path / "dense")
    evaluate(task, "hf", {"pretrained": folder}, use_cache=dense_cache)
    with pytest.raises(UserError, match="left no recipe key"):
        evaluate(task, "calib_pruned", {**base, "sparsity": 0.5}, use_cache=dense_cache)


def test_weights_changed_after_compression_are_noticed(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    lm = CalibPruned(pretrained=folder, method="magnitude", sparsity=0.5, device="cpu")
    lm.get_model_info()
    lm.model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(CalibError, match="changed since they were compressed"):
        lm.get_model_info()


def test_adapters_are_merged_first(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = saved_model(tmp_path / "model")
    adapted = peft.get_peft_model(
        make_model(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    lm = CalibPruned(
        pretrained=folder,
        peft=str(tmp_path / "adapter"),
        method="magnitude",
        sparsity=0.5,
        device="cpu",
    )
    merged = adapted.merge_and_unload()
    name = "model.layers.0.self_attn.q_proj"
    expected = merged.get_submodule(name).weight.detach()
    found = lm.model.get_submodule(name).weight.detach()
    kept = found != 0
    assert kept.float().mean() == 0.5
    torch.testing.assert_close(found[kept], expected[kept])


def test_the_classes_take_only_their_kind() -> None:
    with pytest.raises(UserError, match="use --model calib_pruned"):
        CalibQuantized(pretrained="m", method="wanda", sparsity=0.5)
    assert Calib.kinds == ("pruning", "quantization", "joint")


def test_batch_size_given_twice() -> None:
    assert (
        merge_harness({"batch_size": 4}, {"batch_size": "4", "device": None})["batch_size"] == "4"
    )
    with pytest.raises(UserError, match="give batch_size once"):
        merge_harness({"batch_size": 4}, {"batch_size": 8})


def test_arguments_win_over_the_defaults_of_the_harness() -> None:
    """The command line always passes a batch size and a device."""
    merged = merge_harness(
        {"batch_size": 8, "device": "cpu"}, {"batch_size": 1, "device": "cuda:0"}
    )
    assert merged == {"batch_size": 8, "device": "cpu"}


def test_a_recipe_file_may_hold_runtime_arguments(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: magnitude\nsparsity: 0.5\nprogress: false\ncalib_batch_size: 2\n")
    lm = CalibPruned(pretrained=make_model(), tokenizer=make_tokenizer(), recipe=str(recipe))
    assert lm.report.achieved["sparsity"] == 0.5


def test_argument_text() -> None:
    text = 'pretrained=m,sparsity=0.5,modules=["a","b"],x=none,flag=True,name="a,b",n=-1'
    assert parse_argument_text(text) == {
        "pretrained": "m",
        "sparsity": 0.5,
        "modules": ["a", "b"],
        "x": None,
        "flag": True,
        "name": "a,b",
        "n": -1,
    }
    assert parse_argument_text("calibration=file:it's.jsonl,revision=1e5,sparsity=0.5") == {
        "calibration": "file:it's.jsonl",
        "revision": "1e5",
        "sparsity": 0.5,
    }
    assert parse_argument_text('{"pretrained": "m", "calibration": [{"source": "self"}]}') == {
        "pretrained": "m",
        "calibration": [{"source": "self"}],
    }


def test_loading_arguments_pass_through() -> None:
    ours, theirs = split_arguments(
        {"method": "wanda", "attn_implementation": "eager", "dtype": "float32", "revision": "x"}
    )
    assert ours == {"method": "wanda"}
    assert theirs == {"attn_implementation": "eager", "dtype": "float32", "revision": "x"}


def test_remote_code_is_recorded(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    options = {"method": "magnitude", "sparsity": 0.5, "device": "cpu"}
    trusted = CalibPruned(pretrained=folder, trust_remote_code=True, **options)
    assert any("trust_remote_code" in w for w in trusted.report.summary()["warnings"])
    assert not CalibPruned(pretrained=folder, **options).report.warnings


def test_a_full_disk_is_noticed_before_writing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shutil

    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("lm_calib_plugin.storage.shutil.disk_usage", lambda _path: full)
    with pytest.raises(UserError, match=r"report_dir=.*|0 MiB are free"):
        CalibPruned(
            pretrained=make_model(),
            tokenizer=make_tokenizer(),
            method="magnitude",
            sparsity=0.5,
            report_dir=str(tmp_path / "reports"),
        )
    assert not (tmp_path / "reports").exists() or not list((tmp_path / "reports").iterdir())
