"""Runs read from every kind of file, damaged ones refused, and the command from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_calib_plugin import cli
from lm_calib_plugin.compression import compress
from lm_calib_plugin.diagnostics.layers.diagnosis import diagnose
from lm_calib_plugin.diagnostics.layers.findings import findings
from lm_calib_plugin.diagnostics.layers.opening import check_models, text_recipes
from lm_calib_plugin.diagnostics.layers.reading import EXPORT, LAYERS, RESULTS, read_run
from lm_calib_plugin.diagnostics.layers.sections import document
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.export.command import export
from lm_calib_plugin.export.options import ExportOptions
from lm_calib_plugin.integrations.exported import CalibModelForCausalLM
from lm_calib_plugin.loading import Loading, load_model
from lm_calib_plugin.recipe import Recipe
from tests.diagnostics.layer_runs import QUIET, examined, results_file, saved, words
from tests.tiny import make_model, saved_model

WANDA: dict[str, Any] = {"method": "wanda", "sparsity": 0.5, "nsamples": 10, "seqlen": 32}


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Any]:
    """The results file of a pruned tiny model, and its report."""
    folder, text = saved_model(tmp_path / "dense"), words(tmp_path / "a.jsonl")
    return results_file(tmp_path, folder, calibration=text, **WANDA)


def command(*arguments: str) -> int:
    try:
        cli.main(["inspect", "layers", *arguments, "--quiet"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_results_file_and_its_folder(run: tuple[Path, Any]) -> None:
    file, report = run
    found = read_run(file)
    assert found == read_run(file.parent)
    assert (found.kind, found.key) == (RESULTS, report.key)
    for mine, theirs in zip(found.rows, report.layers, strict=True):
        for name in ("name", "shape", "removed", "error_calibration", "error_heldout", "tokens"):
            assert getattr(mine, name) == getattr(theirs, name)
    assert found.recipe is not None
    assert found.recipe.sparsity == 0.5
    assert found.pretrained == str(file.parent / "dense")
    assert found.dtype == "float32"
    assert found.calib_id == report.calibration["calib_id"]


def test_compressed_again_it_is_the_same(run: tuple[Path, Any]) -> None:
    found = examined(run[0])
    assert found.opened is not None
    assert found.opened.notes == []
    assert len(found.opened.calibration) == 9  # one of ten is held out
    calibration = {x.name: x.calibration for x in found.layers}
    first = "model.layers.0.self_attn.q_proj"
    # In the first layer the dense inputs are those of the run.
    assert calibration[first] is not None
    expected = next(r.error_calibration for r in run[1].layers if r.name == first)
    assert calibration[first].error == pytest.approx(expected, rel=1e-4)


def test_an_exported_folder(tmp_path: Path) -> None:
    folder, text = saved_model(tmp_path / "dense"), words(tmp_path / "a.jsonl")
    recipe = Recipe(calibration=text, **WANDA)
    export(recipe, Loading(folder), tmp_path / "out", runtime=QUIET)
    found = read_run(tmp_path / "out")
    assert (found.kind, found.pretrained, len(found.rows)) == (EXPORT, None, 21)
    assert found.recipe == recipe
    with pytest.raises(UserError, match="does not say where its dense model is"):
        check_models(found, None, None, None)
    assert command(str(tmp_path / "out"), "--pretrained", folder, "--text-length", "32") == 0
    assert command(str(tmp_path / "out"), "--no-propagation") == 0
    report = tmp_path / "out" / "report.json"
    report.write_text(report.read_text().replace("0.5", "0.6"))
    with pytest.raises(CalibError, match=r"report\.json"):
        read_run(tmp_path / "out")


def test_a_file_of_layers_alone(run: tuple[Path, Any]) -> None:
    side = Path(run[1].report_file)
    found = read_run(side)
    assert (found.kind, found.recipe, found.key) == (LAYERS, None, run[1].key)
    assert found.rows == read_run(run[0]).rows
    assert read_run(side.parent) == found
    assert check_models(found, None, None, None) is None
    said = findings(diagnose(found))
    assert said[0].startswith("The error ")
    assert "Only the report was read" in said[-1]
    with pytest.raises(UserError, match="--compressed DIR"):
        check_models(found, "m", None, None)
    assert check_models(found, "m", "c", None) == "m"


@pytest.mark.parametrize("change", ["byte", "other", "gone", "name"])
def test_a_damaged_side_file_is_refused(run: tuple[Path, Any], change: str) -> None:
    file, report = run
    side = Path(report.report_file)
    if change == "byte":
        side.write_text(side.read_text().replace('"removed":0.5', '"removed":0.4', 1))
        for place in (file, side):
            with pytest.raises(CalibError, match=r"expected (sha256|contents)"):
                read_run(place)
    elif change == "other":
        side.write_text('{"key": "a", "layers": []}')
        with pytest.raises(CalibError, match="nothing of it is used"):
            read_run(file)
    elif change == "gone":
        moved = file.parent / side.name
        shutil.move(side, moved)
        assert read_run(file).rows  # beside the results file it is found
        moved.unlink()
        with pytest.raises(UserError, match="copy it beside"):
            read_run(file)
    else:
        content = json.loads(file.read_text())
        content["config"]["compression"]["report_file"] = "/etc/passwd"
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"a layers-\*\.json"):
            read_run(file)


@pytest.mark.parametrize(
    "row",
    [
        {"name": 3, "shape": [1, 1]},
        {"name": "a", "shape": [1]},
        {"name": "a", "shape": [1, 1], "removed": "much"},
        {"name": "a", "shape": [1, 1], "error_calibration": float("nan")},
        {"name": "a", "shape": [1, 1], "tokens": True},
    ],
)
def test_rows_are_not_believed(tmp_path: Path, row: dict[str, Any]) -> None:
    file = tmp_path / "my.json"
    file.write_text(json.dumps({"key": "k", "layers": [row]}))
    with pytest.raises(CalibError, match=r"my\.json.*expected"):
        read_run(file)


def test_what_can_not_be_done_again_is_said(run: tuple[Path, Any]) -> None:
    file, _ = run
    content = json.loads(file.read_text())
    summary = content["config"]["compression"]
    summary["recipe"]["calibration"] = "given"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="given in memory.*--compressed DIR"):
        check_models(read_run(file), None, None, None)
    assert check_models(read_run(file), None, None, False) is None
    summary["recipe"] |= {"method": "no-such-method", "calibration": "self"}
    file.write_text(json.dumps(content))
    assert "no-such-method" in read_run(file).no_recipe
    content["config"]["model_args"]["peft"] = "adapter"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="adapters were merged"):
        check_models(read_run(file), None, "c", None)


def test_several_runs_in_a_folder_are_named(run: tuple[Path, Any]) -> None:
    file, _ = run
    shutil.copy(file, file.with_name("results_2.json"))
    with pytest.raises(UserError, match=r"holds 2 runs.*results_2\.json"):
        read_run(file.parent)


def test_another_dense_model_is_said(run: tuple[Path, Any], tmp_path: Path) -> None:
    other = saved_model(tmp_path / "other", seed=1)
    found = examined(run[0], pretrained=other)
    assert found.opened is not None
    said = " ".join(found.opened.notes)
    assert "not quite that of the run" in said
    assert "compressed again it has the key" in said


def test_folders_that_hold_something_else(tmp_path: Path, run: tuple[Path, Any]) -> None:
    """Another compressed model is said to be one; levels for gptqmodel are compressed again."""
    dense = str(tmp_path / "dense")
    export(
        Recipe(method="magnitude", sparsity=0.3), Loading(dense), tmp_path / "other", runtime=QUIET
    )
    model = CalibModelForCausalLM.from_pretrained(tmp_path / "other")
    found = examined(run[0], compressed=model)
    assert found.opened is not None
    assert any("the compressed model has the key" in note for note in found.opened.notes)
    recipe = Recipe(method="rtn", bits=4, group_size=-1)
    options = ExportOptions(format="gptq", check=False)
    big = saved_model(tmp_path / "big", intermediate_size=64, num_key_value_heads=4)
    half = Loading(big, dtype="float16")
    export(recipe, half, tmp_path / "packed", options=options, runtime=QUIET)
    read = read_run(tmp_path / "packed")
    assert read.recipe is not None
    assert (read.folder, read.recipe.to_metadata()) == (None, recipe.to_metadata())
    assert read.dtype == "float16"
    found = examined(tmp_path / "packed", words(tmp_path / "a.jsonl"), pretrained=big)
    assert found.opened is not None
    assert found.opened.notes == []


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        ("rotation", "llama"),
        *((t, n) for t in ("smoothquant", "awq") for n in ("llama", "gemma2", "gpt2")),
    ],
)
def test_transformed_models(tmp_path: Path, transform: str, name: str) -> None:
    """Compared in other coordinates than its own, a layer would err by the order of one."""
    folder, text = saved_model(tmp_path / "dense", name), words(tmp_path / "a.jsonl")
    given: dict[str, Any] = {"calibration": text, "nsamples": 8, "seqlen": 32, "bits": 8}
    file, _ = results_file(
        tmp_path, folder, method="rtn", group_size=-1, transform=transform, **given
    )
    found = examined(file)
    assert found.propagation is not None
    assert max(found.propagation.curve("free")) < 1e-3
    assert found.unlike == set()
    for layer in found.layers:
        assert layer.text is not None
        assert layer.calibration is not None
        assert layer.row.error_calibration is not None
        # The report measures with inputs of the compressed model, which are nearly those.
        ratio = (layer.calibration.error or 0.0) / layer.row.error_calibration
        assert 0.5 < ratio < 1.5, layer.name
    verb = "rotated" if transform == "rotation" else "scaled"
    assert any(f"compared are {verb} weights" in note for note in findings(found))


@pytest.mark.parametrize(
    "recipe",
    [{"method": "shortgpt", "blocks": 1}, {"method": "shortgpt", "blocks": 1, "sublayer": "mlp"}],
    ids=["block", "mlp"],
)
def test_parts_taken_out(tmp_path: Path, recipe: dict[str, Any]) -> None:
    folder, text = saved_model(tmp_path / "dense"), words(tmp_path / "a.jsonl")
    file, report = results_file(tmp_path, folder, calibration=text, nsamples=8, seqlen=32, **recipe)
    found = examined(file)
    said = findings(found)
    assert said[0].startswith("1 part was taken out")
    assert report.structure["removed"][0] in said[0]
    assert found.propagation is not None
    assert found.propagation.aligned == ("sublayer" in recipe)
    if not found.propagation.aligned:
        assert any("only ends are compared" in one for one in said)
    assert "no layer has an error" in document(found).text()


def test_a_model_that_keeps_every_weight(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "dense")
    file, _ = results_file(tmp_path, folder, method="magnitude", sparsity=0)
    found = examined(file, words(tmp_path / "a.jsonl"))
    said = findings(found)
    assert said[0].startswith("No layer has any error")
    assert any("same to the last bit" in one for one in said)
    assert "JS 0 nats" in " ".join(said)
    assert document(found).html().count("<svg") == 0


def test_texts_of_a_run(run: tuple[Path, Any], tmp_path: Path) -> None:
    found = read_run(run[0])
    first, second = text_recipes(found, None, 4, 16, 0)
    assert (first.fold, second.fold) == ("judge", "all")
    assert first.calib_seed == second.calib_seed == 1  # another draw than that of the run
    (typed,) = text_recipes(found, f"file:{tmp_path / 'a.jsonl'}", 4, 16, 3)
    assert (typed.nsamples, typed.seqlen, typed.calib_seed) == (4, 16, 3)
    with pytest.raises(UserError, match="text: "):
        text_recipes(found, "no-such-source", 4, 16, 0)
    folder = saved_model(tmp_path / "free")
    (tmp_path / "out").mkdir()
    file, _ = results_file(tmp_path / "out", folder, method="magnitude", sparsity=0.5)
    assert [r.terms[0].name for r in text_recipes(read_run(file), None, 4, 16, 0)] == ["self"] * 2


def test_the_command(
    run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    given = ("--text-samples", "4", "--text-length", "32", "--out", str(out))
    assert command(str(run[0]), *given) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Layers of {tmp_path / 'dense'} under wanda")
    assert "* The error " in shown
    data = json.loads((out / "layers.json").read_text())
    assert data["key"] == run[1].key
    assert len(data["layers"]) == 21
    assert data["propagation"]["free"][0] == data["propagation"]["teacher_forced"][0] > 0
    assert data["text"]["calib_id"]
    assert data["versions"]["torch"] == torch.__version__
    names = {file.name for file in out.iterdir()}
    assert "layers-error-by-depth.svg" in names
    first = (out / "layers.json").read_bytes()
    assert command(str(run[0]), *given) == 0
    assert (out / "layers.json").read_bytes() == first  # once more: the same


def test_static_ranges_of_first_tokens_are_a_reason(tmp_path: Path) -> None:
    """A beginning of sequence that is embedded 30 times as large widens ranges alone."""
    model = make_model()
    model.config.bos_token_id = 1
    folder, text = saved(tmp_path / "m", model), words(tmp_path / "a.jsonl")
    file, report = results_file(
        tmp_path, folder, method="rtn", scheme="W8A8_static", calibration=text, nsamples=8,
        seqlen=32,
    )  # fmt: skip
    model, tokenizer = load_model(Loading(folder))
    again = compress(model, tokenizer, read_run(file).recipe or Recipe(**WANDA), QUIET)
    assert again.weights_digest == report.weights_digest
    found = examined(file)
    assert found.opened is not None
    assert found.opened.notes == []
    assert all(x.text is not None and x.text.of_inputs is not None for x in found.layers)
