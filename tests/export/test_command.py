"""``lm-calib export``: what is typed is understood, and mistakes cost nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lm_calib_plugin import CalibPruner
from lm_calib_plugin.cli import main
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.export.records import verify_folder
from lm_calib_plugin.loading import Loading, load_model
from tests.tiny import saved_model

SMALL = ["--calibration", "random", "--nsamples", "10", "--seqlen", "16", "--quiet"]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["export", *words])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("base"))


def test_fields_stand_anywhere(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    results = {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "dense.json").write_text(json.dumps({"results": {"arc_easy": {"acc,none": 0.75}}}))
    given = ["--results", str(tmp_path / "results.json"), "--license", "mit"]
    given += ["--dense-results", str(tmp_path / "dense.json")]
    words = ["--method=wanda", "--pretrained", base, "--sparsity", "0.25", *SMALL, *given]
    assert run(*words, str(out)) == 0
    shown = capsys.readouterr().out
    assert "wanda: 21 layers, 25.00% removed" in shown
    assert f"lm_eval --model hf --model_args pretrained={out}" in shown
    assert verify_folder(out).facts["format"] == "dense"
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "arc_easy" in card
    assert "0.75" in card
    # Once more: the same model, nothing to do.
    assert run(*words, str(out)) == 0
    assert "holds this very model already" in capsys.readouterr().out


def test_a_recipe_from_a_folder(base: str, tmp_path: Path) -> None:
    assert (
        run("--pretrained", base, "--method", "rtn", "--group-size", "16", str(tmp_path / "a")) == 0
    )
    recipe = str(tmp_path / "a" / "recipe.yaml")
    assert run("--pretrained", base, "--recipe", recipe, str(tmp_path / "b")) == 0
    keys = [verify_folder(tmp_path / name).facts["key"] for name in "ab"]
    assert keys[0] == keys[1]


def test_options_go_by_either_name(base: str, tmp_path: Path) -> None:
    recipe = ["--method", "rtn", "--bits", "8", "--group-size", "16"]
    given = [f"--model={base}", "--export_format", "dense", "--max_shard_size=1GB"]
    assert run(*recipe, *given, str(tmp_path / "a")) == 0
    assert run(*recipe, "--pretrained", base, "--format=dense", str(tmp_path / "b")) == 0
    facts = [verify_folder(tmp_path / name).facts for name in "ab"]
    assert facts[0]["key"] == facts[1]["key"]
    assert [f["format"] for f in facts] == ["dense", "dense"]


def test_a_model_in_a_subfolder(base: str, tmp_path: Path) -> None:
    """Weights and tokenizer of that folder, whatever stands above it."""
    words = ["--method", "wanda", "--sparsity", "0.5", *SMALL]
    place = Path(base)
    above = ["--pretrained", str(place.parent), "--subfolder", place.name]
    assert run(*words, *above, str(tmp_path / "a")) == 0
    assert run(*words, "--pretrained", base, str(tmp_path / "b")) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_revision_is_one_of_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def note(name: str, **options: object) -> None:
        asked[name] = options.get("revision")
        raise OSError("stop here")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", note)
    for tokenizer in (None, "some/model", "other/tokenizer"):
        loading = Loading("some/model", tokenizer, "v2")
        with pytest.raises(UserError, match="stop here"):
            load_model(loading)
        pruner = CalibPruner.from_pretrained("some/model", tokenizer, revision="v2")
        with pytest.raises(UserError, match="stop here"):
            _ = pruner.tokenizer
        assert asked == {
            tokenizer or "some/model": None if tokenizer == "other/tokenizer" else "v2"
        }
        asked.clear()


@pytest.mark.parametrize("wrong", [{"dtype": "flot16"}, {"dtype": "int8"}, {"device": "gpu"}])
def test_dtype_and_device_are_checked_by_every_command(
    wrong: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (name, value), folder = next(iter(wrong.items())), str(tmp_path / "none")
    with pytest.raises(UserError, match=f"{name}: got '{value}'"):
        CalibPruner.from_pretrained(folder, **wrong)
    given = ["--pretrained", folder, f"--{name}", value]
    for words in (
        ["calibrate", "random", "--out", str(tmp_path / "o"), *given],
        ["bank", "--out", str(tmp_path / "o"), "--source", "a=random", *given],
        ["preflight", "method=wanda,sparsity=0.5", "--set", "a=random", "--domain", "b=self"]
        + given,
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert f"{name}: got '{value}'" in told
        assert len(told.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "wnada"], "did you mean `wanda`?"),
        (["--method", "wanda", "--sparsty", "0.5"], "did you mean `--sparsity`?"),
        (
            ["--method", "wanda", "--sparsity", "0.5", "--format", "onnx"],
            "dense, compressed-tensors",
        ),
        (
            ["--method", "rtn", "--scheme", "W8A8", "--format", "dense"],
            "error: format: dense holds weights alone, and the recipe rounds the inputs of layers, "
            "too; compressed-tensors; --format compressed-tensors",
        ),
        (["--method", "rtn", "--dtype", "flot16"], "dtype: got 'flot16'; did you mean `float16`?"),
        (["--method", "rtn", "--device", "gpu"], "device: got 'gpu'; "),
        (["--method", "rtn", "--device", "cuda:99"], "this machine has: cpu"),
        (["--method", "rtn", "--kv-bits", "8"], "export without kv_bits"),
        (["--method", "wanda", "--sparsity", "0.5", "--results", "/none"], "can not be read"),
        (["--method", "magnitude", "--sparsity", "0.5", "--max-shard-size", "big"], "such as 5GB"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_mistakes_are_told_before_anything_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The model is not there: whoever gets to load it says so.
    assert run("--pretrained", str(tmp_path / "none"), *words, str(tmp_path / "out")) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
