"""``lm-calib calibrate``: a folder that gives the run of the inline expression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin import CalibrationSet, cli
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.harness import CalibPruned
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.registry import table
from tests.tiny import make_tokenizer, saved_model

SEQLEN = {"seqlen": "16", "nsamples": "6"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def texts(tmp_path: Path) -> str:
    file = tmp_path / "texts.jsonl"
    rows = [
        {"text": f"the {a} of {b} is in a {c} " * 8}
        for a, b, c in zip("abc", "def", "ghi", strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{file}"


def calibrate(*arguments: str, **options: str) -> int:
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    with pytest.raises(SystemExit) as end:
        cli.main(["calibrate", *arguments, *flags, "--quiet"])
    return int(end.value.code or 0)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def compressed(model: str, **fields: Any) -> CalibPruned:
    return CalibPruned(
        pretrained=model, method="wanda", sparsity=0.5, device="cpu", progress=False, **fields
    )


@pytest.mark.parametrize("expression", ["texts", "self", "random", "texts*0.5+self*0.5"])
def test_a_set_gives_the_run_that_built_it(
    expression: str, model: str, texts: str, tmp_path: Path
) -> None:
    expression = expression.replace("texts", texts)
    out = tmp_path / "set"
    assert calibrate(expression, pretrained=model, out=str(out), device="cpu", **SEQLEN) == 0
    inline = compressed(model, calibration=expression, **SEQLEN).report
    stored = compressed(model, calibration=f"set:{out}").report
    assert stored.calibration["calib_id"] == inline.calibration["calib_id"]
    assert stored.key == inline.key
    assert stored.weights_digest == inline.weights_digest
    assert stored.recipe["nsamples"] == 6
    assert stored.recipe["seqlen"] == 16
    again = Recipe(**stored.recipe)
    assert again.nsamples == 6
    assert CalibrationSet.load(out).calib_id == inline.calibration["calib_id"]


def test_same_arguments_same_bytes(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Self-generated text too, written twice without the cache."""
    for name in ("a", "b"):
        monkeypatch.setenv("LM_CALIB_CACHE", str(tmp_path / f"cache-{name}"))
        folder = tmp_path / name / "set"
        calibrate("self", pretrained=model, out=str(folder), device="cpu", **SEQLEN)
    assert snapshot(tmp_path / "a" / "set") == snapshot(tmp_path / "b" / "set")


def test_a_folder_that_is_there(
    model: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "set")
    calibrate(texts, pretrained=model, out=out, **SEQLEN)
    first = snapshot(tmp_path / "set")
    assert calibrate(texts, pretrained=model, out=out, **SEQLEN) == 0
    assert "was there already, nothing was written" in capsys.readouterr().out
    assert calibrate(texts, "--calib-seed=1", pretrained=model, out=out, **SEQLEN) == 2
    assert "holds another calibration set" in capsys.readouterr().err
    assert snapshot(tmp_path / "set") == first
    assert calibrate("random", "--overwrite", pretrained=model, out=out, **SEQLEN) == 0
    assert snapshot(tmp_path / "set") != first
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        assert calibrate(texts, *more, pretrained=model, out=str(tmp_path / "other")) == 2
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_changed_data_under_the_same_arguments_is_another_set(
    model: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "set")
    calibrate(texts, pretrained=model, out=out, **SEQLEN)
    file = Path(texts.removeprefix("file:"))
    file.write_text(file.read_text().replace("the", "for"))
    assert calibrate(texts, pretrained=model, out=out, **SEQLEN) == 2
    assert "holds another calibration set" in capsys.readouterr().err


def test_only_a_source_that_needs_the_model_loads_it(
    model: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    assert calibrate(texts, pretrained=model, out=str(tmp_path / "a"), **SEQLEN) == 0
    with pytest.raises(AssertionError, match="weights were read"):
        cli.main(["calibrate", "self", "--pretrained", model, "--out", str(tmp_path / "b")])


def test_the_summary_says_what_to_type_next(
    model: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    calibrate(texts, pretrained=model, out=str(out), **SEQLEN)
    shown = capsys.readouterr().out
    made = CalibrationSet.load(out)
    for words in (made.calib_id, "6 of at most 16 tokens, 96 in all", texts, "license", "seconds"):
        assert words in shown
    (line,) = [line for line in shown.splitlines() if "--model_args" in line]
    arguments = line.split("--model_args ")[1].split(" ")[0]
    assert arguments == f"pretrained={model},method=wanda,sparsity=0.5,calibration=set:{out}"


def test_the_summary_of_a_mixture_names_its_method_and_ridge(
    model: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    mixture, served = f"minimax({texts}+random)", "method=sparsegpt,sparsity=0.5,ignore=*down_proj"
    flags = {"pretrained": model, "out": str(out), "device": "cpu", "nsamples": "4"}
    long = tmp_path / "texts.jsonl"  # enough documents for every fold
    long.write_text("".join(json.dumps({"text": f"a {i} b c d " * 20}) + "\n" for i in range(40)))
    assert calibrate(mixture, **flags, **{"for": served}, seqlen="16") == 0
    record = json.loads((out / "calibration.json").read_text())
    assert record["factors"]["for"]["ignore"] == ["*down_proj"]
    (found,) = [s["mixture"]["damp"] for s in record["sources"] if "mixture" in s]
    shown = capsys.readouterr().out
    typed = shown.split("--model_args ")[1].split(" ")[0]
    arguments = dict(pair.split("=", 1) for pair in typed.split(","))
    assert arguments["method"] == "sparsegpt"
    assert float(arguments["damp"]) == found
    assert "--model calib_pruned" in shown
    # Same numbers as the expression in place, which takes the ridge that it finds.
    given = {"device": "cpu", "progress": False, "ignore": "*down_proj"}
    stored = CalibPruned(**arguments, **given).report
    arguments |= {"calibration": mixture, "nsamples": "4", "seqlen": "16"}
    del arguments["damp"]
    inline = CalibPruned(**arguments, **given).report
    assert stored.key == inline.key
    assert stored.weights_digest == inline.weights_digest


def test_a_mixture_is_checked_before_a_model_is_loaded() -> None:
    for expression in ("minimax(random)", "cross(random+random)", "minimax(self+random)?limit=2"):
        with pytest.raises(UserError, match="calibration: "):
            compressed("/nowhere/model", calibration=expression)


BAD = [
    (["random", "--out", "a+b"], "out: 'a+b' holds `+`"),
    (["slef"], "did you mean `self`?"),
    (["none"], "calibration: got none"),
    (["random", "--nsample", "4"], "did you mean `--nsamples`?"),
    (["random", "--sparsity", "0.5"], "--sparsity: unknown option"),
    (
        ["cross(self+random)", "--for", "method=wanda,sparsity=0.5,nsamples=4"],
        "for: got nsamples=4",
    ),
    (["cross(self+random)", "--for", "method=wanda,sparsity=0.5,calibration=c4"], "; EXPR."),
    (["random", "--nsamples"], "--nsamples: has no value"),
    (["random", "--nsamples=0"], "nsamples: got '0'"),
    (["random", "--seqlen", "4096"], "the model accepts 64 positions"),
    (["file:/nowhere.txt"], "no file or folder"),
    (["random", "--pretrained", "/nowhere/model"], "pretrained: `/nowhere/model` cannot be loaded"),
    (["random", "--pretrained", "builtin:smolm2"], "no builtin model"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda v: str(v)[:40])
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str],
    message: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--pretrained" not in arguments:
        arguments = [*arguments[:1], "--pretrained", model, *arguments[1:]]
    with pytest.raises(SystemExit) as end:
        cli.main(["calibrate", *arguments[:1], "--out", str(tmp_path / "set"), *arguments[1:]])
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert [x for x in shown.splitlines() if x.startswith("error: ")] == [shown.strip()]
    assert not list(tmp_path.iterdir())


def test_every_calibration_field_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    fields = set(Recipe.calibration_fields())
    rows = [*table("pruning").values(), *table("quantization").values()]
    assert {"calibration", "nsamples", "seqlen", "calib_seed", "pack"} <= fields
    assert not fields & {name for row in rows for name in row.options}
    assert not fields & {
        "method",
        "heldout",
        "propagate",
        "targets",
        "ignore",
        "block_path",
        "untie",
    }
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "--help"])
    shown = capsys.readouterr().out
    for name in fields - {"calibration"}:
        assert f"--{name.replace('_', '-')} VALUE" in shown


def test_a_set_for_another_tokenizer_is_refused(model: str, texts: str, tmp_path: Path) -> None:
    other = make_tokenizer()
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path / "tokenizer")
    out = str(tmp_path / "set")
    calibrate(texts, pretrained=model, out=out, tokenizer=str(tmp_path / "tokenizer"), **SEQLEN)
    with pytest.raises(ValueError, match="was made with tokenizer .* lm-calib calibrate"):
        compressed(model, calibration=f"set:{out}")
