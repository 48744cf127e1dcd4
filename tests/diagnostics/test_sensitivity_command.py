"""``lm-calib inspect sensitivity`` from the command line to its files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lm_calib_plugin.cli import app
from lm_calib_plugin.diagnostics.sensitivity import SensitivityOptions, sensitivity_of
from lm_calib_plugin.diagnostics.sensitivity.sensitivity import check_sensitivity, short_names
from lm_calib_plugin.drawing import rendered
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import Recipe
from tests.diagnostics.sensitive import QUIET, RTN, assert_same, state, text_file
from tests.tiny import make_model, make_tokenizer, saved_model

SMALL = {"nsamples": 4, "seqlen": 16}


def command(folder: Path, *more: str) -> Any:
    words = ["inspect", "sensitivity", "--pretrained", saved_model(folder / "model")]
    words += ["--text", text_file(folder), "--text-samples", "4", "--text-length", "16", "--quiet"]
    return CliRunner().invoke(app, [*words, *more], catch_exceptions=False)


def test_everything_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command(
        tmp_path, "--method", "rtn", "--bits", "3", "--group-size", "8", "--noise-seeds", "1",
        "--probe", "groups+blocks+noise+depth", "--against", "random", "--draws", "2",
        "--out", str(out),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads((out / "sensitivity.json").read_text())
    assert [len(found[p]["groups"]) for p in ("groups", "blocks")] == [11, 3]
    assert len(found["noise"]["curves"][0]["points"]) == 8
    # Five metrics on two draws of two texts.
    assert len(found["depth"]["rankings"]) == 20
    assert [one["text"][:4] for one in found["texts"]] == ["file", "rand", "file", "rand"]
    assert len({one["calib_id"] for one in found["texts"]}) == 4
    assert found["recipe"]["bits"] == 3
    assert found["key"]
    assert found["versions"]["torch"]
    # The error of the recipe is that of everything compressed, in all probes.
    everything = found["groups"]["all"]
    assert everything == found["blocks"]["all"] == found["noise"]["recipe"]["scores"]
    page = (out / "sensitivity.html").read_text()
    for finding in found["findings"]:
        assert finding in done.output
    assert "Noise of stated size" in page
    if rendered.available():
        assert len(list(out.glob("*.svg"))) >= 3


def test_depth_needs_no_recipe(tmp_path: Path) -> None:
    done = command(tmp_path, "--probe", "depth", "--metric", "cosine+loss", "--unit", "mlp")
    assert done.exit_code == 0, done.output
    assert "the mlps that would go first on file:text.jsonl" in done.output
    assert "metrics" in done.output


def test_noise_on_inputs_needs_no_recipe(tmp_path: Path) -> None:
    done = command(
        tmp_path, "--probe", "noise", "--noise-in", "inputs", "--noise", "uniform",
        "--noise-layers", "mlp",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Noise on inputs of 9 layers" in done.output


def test_the_model_is_left_as_found(tmp_path: Path) -> None:
    model = make_model()
    model.train()
    before = state(model)
    options = SensitivityOptions("groups+noise+depth", seeds=1, sizes=(0.1, 0.2))
    text = text_file(tmp_path)
    found = [
        sensitivity_of(model, make_tokenizer(), text, RTN, options, SMALL, QUIET) for _ in range(2)
    ]
    assert_same(before, model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    first, second = ({**f.data, "seconds": None} for f in found)
    assert json.dumps(first, default=str) == json.dumps(second, default=str)


@pytest.mark.parametrize(
    ("given", "argument", "lesson"),
    [
        ({"probes": "group"}, "probe", "did you mean `groups`"),
        ({"probes": ""}, "probe", "allowed: groups, blocks, noise, depth"),
        ({"noises": "gauss"}, "noise", "allowed: gaussian, uniform, aligned"),
        ({"place": "activations"}, "noise_in", "allowed: weights, inputs"),
        ({"place": "inputs", "noises": "aligned"}, "noise", "--noise-in weights"),
        ({"unit": "head"}, "unit", "allowed: block, attention, mlp"),
        ({"metrics": "cos"}, "metric", "did you mean `cosine`"),
        ({"rise": 0}, "rise", "above 0"),
        ({"seeds": 0}, "noise_seeds", "1"),
        ({"sizes": (0.2, 0.1)}, "sizes", "rising"),
        ({"against": "c4,,code"}, "against", "joined by commas"),
        ({"against": "c4,c4"}, "against", "each once"),
    ],
)
def test_options_that_can_not_be_used(given: dict[str, Any], argument: str, lesson: str) -> None:
    with pytest.raises(UserError) as caught:
        SensitivityOptions(**given)
    assert caught.value.argument == argument
    assert lesson in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "options", "text", "argument", "lesson"),
    [
        (None, {}, "random", "method", "--method rtn --bits 3"),
        (None, {"probes": "noise", "noises": "aligned"}, "random", "method", "aligned noise"),
        (RTN, {"probes": "depth"}, "random", "method", "dense model"),
        (Recipe(method="flap", sparsity=0.2), {}, "random", "method", "whole parts"),
        (
            Recipe(method="awq", bits=3),
            {"probes": "noise", "noises": "aligned"},
            "random",
            "noise",
            "--noise gaussian",
        ),
        (RTN, {"against": "random"}, "self", "against", "--probe depth"),
        (None, {"probes": "depth", "against": "random"}, "random", "against", "the text itself"),
        (None, {"probes": "depth", "against": "nosuch"}, "random", "against", "no source"),
        (RTN, {}, "none", "text", "a source of text"),
    ],
)
def test_questions_that_can_not_be_asked(
    recipe: Recipe | None, options: dict[str, Any], text: str, argument: str, lesson: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_sensitivity(text, recipe, SensitivityOptions(**options))
    assert caught.value.argument == argument
    assert lesson in str(caught.value)


def test_one_sequence_has_no_interval() -> None:
    with pytest.raises(UserError, match="text_samples: got 1"):
        check_sensitivity("random", RTN, None, {"nsamples": 1})
    assert check_sensitivity("random", None, SensitivityOptions("depth"), {"nsamples": 1})


def test_short_names() -> None:
    names = short_names(["file:/a/b/x.txt", "file:/c/y.txt+c4*0.5", "c4"])
    assert list(names.values()) == ["file:x.txt", "file:y.txt+c4*0.5", "c4"]
    alike = ["file:/a/x.txt", "file:/b/x.txt"]
    assert list(short_names(alike).values()) == alike
    # A text that is drawn twice is one text.
    assert short_names(["file:/a/x.txt"] * 2) == {"file:/a/x.txt": "file:x.txt"}


def test_a_text_too_short_says_how_it_is_typed_here(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("the of and to in a " * 100)
    model, tokenizer, options = make_model(), make_tokenizer(), SensitivityOptions("depth")
    with pytest.raises(UserError, match=r"text: file:.*--text-samples, --text-length and --text-f"):
        sensitivity_of(model, tokenizer, f"file:{file}", None, options, SMALL | {"nsamples": 99})
    whole = SMALL | {"fold": "all"}
    assert sensitivity_of(model, tokenizer, f"file:{file}", None, options, whole, QUIET).findings


@pytest.mark.parametrize("fold", ["all", "choose"])
def test_documents_that_calibrate_and_judge_are_told(fold: str, tmp_path: Path) -> None:
    """Data of a file judged on its fifth: told, unless the recipe keeps away from it."""
    text = text_file(tmp_path)
    recipe = Recipe(
        method="wanda", sparsity=0.5, calibration=text, nsamples=4, seqlen=16, fold=fold
    )
    found = sensitivity_of(
        make_model(), make_tokenizer(), text, recipe, SensitivityOptions("blocks"), SMALL, QUIET
    )
    assert ("overlap" in found.facts) == (fold == "all")
    assert "--recompress" in " ".join(found.sections[0].sentences)
    assert found.data["calibration"]["calib_id"] != found.data["texts"][0]["calib_id"]
