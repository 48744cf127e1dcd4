"""``lm-calib bank`` and ``lm-calib draws`` as they are typed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from lm_calib_plugin.bank import Bank
from lm_calib_plugin.calibration.folds import fold_of
from lm_calib_plugin.cli import main
from tests.tiny import saved_model

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, two texts and a bank of them."""
    folder = tmp_path_factory.mktemp("commands")
    saved_model(folder / "model")
    for number, name in enumerate(("one", "two")):
        own = random.Random(number)
        lines = [
            json.dumps({"text": " ".join(own.choices(LETTERS[13 * number :][:13], k=40))})
            for _ in range(120)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    run(bank_arguments(folder))
    return folder


def bank_arguments(folder: Path, *more: str, out: str = "bank") -> list[str]:
    sources = [f"--source={name}=file:{folder / name}.jsonl" for name in ("one", "two")]
    fixed = ["--nsamples", "20", "--seqlen", "16", "--groups", "16", "--quiet"]
    model = ["--pretrained", str(folder / "model"), "--out", str(folder / out)]
    return ["bank", *model, *sources, *fixed, *more]


def draw_arguments(folder: Path, *more: str, method: str = "wanda") -> list[str]:
    model = ["--pretrained", str(folder / "model"), "--method", method]
    return ["draws", str(folder / "bank"), *model, "--nsamples", "8", "--quiet", *more]


WANDA = ("--source", "one", "--sparsity", "0.5", "--draws", "5")


def run(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code in (1, 2)
    return capsys.readouterr().err


def test_a_bank_holds_every_source_in_every_fold(place: Path) -> None:
    bank = Bank.open(place / "bank")
    names = [(part.source, part.fold) for part in bank.header.parts]
    assert names == [("one", "choose"), ("one", "judge"), ("two", "choose"), ("two", "judge")]
    assert [part.groups for part in bank.header.parts] == [16] * 4
    assert bank.sequences == 80
    record = json.loads((place / "bank" / "sets" / "001" / "calibration.json").read_text())
    lines = [json.loads(x)["text"] for x in (place / "one.jsonl").read_text().splitlines()]
    assert {fold_of(line) for line in lines} == {"choose", "validate", "judge"}
    assert record["sources"][0]["fold"] == "judge"


def test_an_equal_command_opens_what_is_there(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {f: f.stat().st_mtime_ns for f in (place / "bank").glob("*.safetensors")}
    run(bank_arguments(place))
    text = capsys.readouterr().out
    assert "one (choose): 20 sequences, 320 tokens, Gram matrices of 16 groups" in text
    assert f"lm-calib draws {place / 'bank'}" in text
    assert {f: f.stat().st_mtime_ns for f in (place / "bank").glob("*.safetensors")} == before


def test_some_layers_and_input_norms_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--no-second-order", "--targets", "*down_proj", "--folds", "choose", "--pack", "concat")
    run(bank_arguments(place, *more, out="few"))
    bank = Bank.open(place / "few")
    assert [row.layers for row in bank.inputs] == [
        (f"model.layers.{i}.mlp.down_proj",) for i in range(3)
    ]
    assert not any(part.second_order for part in bank.header.parts)
    capsys.readouterr()
    arguments = draw_arguments(place, *WANDA)
    arguments[1] = str(place / "few")
    run(arguments)
    text = capsys.readouterr().out
    assert "3 layers" in text
    assert "spread" not in text  # nothing to judge on


@pytest.mark.parametrize("method", ["wanda", "gptq", "magnitude"])
def test_draws_are_summed_up_written_and_drawn(
    method: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strength = {"gptq": ("--bits", "3", "--group-size=8")}.get(method, ("--sparsity", "0.5"))
    more = ("--source", "one", "--draws", "5", "--out", str(tmp_path / "new"), *strength)
    run(draw_arguments(place, *more, method=method))
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "draws.json").read_text())
    assert (tmp_path / "new" / "draws.png").read_bytes().startswith(b"\x89PNG")
    assert found["method"] == method
    assert list(found["domains"]) == ["one", "two"]
    assert (found["draws"], found["pool"], found["nsamples"]) == (5, 20, 8)
    assert f"{found['flip']:.5f} of the weights" in text
    for domain, values in found["domains"].items():
        assert f"{100 * values['relative_spread']:.2f} % of the error on {domain}" in text
    if method == "magnitude":
        assert found["flip"] == 0
        assert found["domains"]["two"]["relative_spread"] == 0


def test_only_the_domains_that_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(draw_arguments(place, *WANDA, "--domain", "two", "--rows", "0"))
    text = capsys.readouterr().out
    assert "error on two" in text
    assert "error on one" not in text
    assert "all output rows" in text


def test_what_cannot_be_asked(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*more: str, command: list[str] | None = None) -> str:
        return refused(command or draw_arguments(place, *more), capsys)

    assert "it holds: one (choose), one (judge)" in says("--source", "three", *WANDA[2:])
    assert "no `four` in fold judge" in says(*WANDA, "--domain", "four")
    assert "did you mean `--sparsity`?" in says("--source", "one", "--sparsty", "0.5")
    assert "lm-calib draws --help" in says("--source", "one", "--nothing", "0.5")
    assert "sparsity: missing" in says("--source", "one")
    (tmp_path / "draws.json").write_text("{}")
    assert "holds draws.json" in says(*WANDA, "--out", str(tmp_path))
    saved_model(tmp_path / "model", "llama", num_hidden_layers=2)
    arguments = draw_arguments(place, *WANDA)
    arguments[3] = str(tmp_path / "model")
    assert "was built with model" in says(command=arguments)
    arguments = draw_arguments(place, *WANDA)
    arguments[1] = str(tmp_path)
    assert "build one with lm-calib bank" in says(command=arguments)


def test_a_damaged_bank_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(place / "bank", tmp_path / "bank")
    file = tmp_path / "bank" / "block-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    arguments = draw_arguments(place, *WANDA)
    arguments[1] = str(tmp_path / "bank")
    assert "block-00001.safetensors: damaged: expected sha256" in refused(arguments, capsys)


def test_what_no_bank_can_be_made_of(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*more: str, drop: bool = False) -> str:
        arguments = bank_arguments(place, *more, out="never")
        return refused([a for a in arguments if not (drop and "--source" in a)], capsys)

    assert "none given" in says(drop=True)
    assert "NAME=EXPR" in says("--source", "self")
    assert "given twice" in says("--source", "one=self")
    assert "got choose, lose; of all, choose, validate, judge" in says("--folds", "choose,lose")
    assert "--fold: unknown option" in says("--fold", "judge")
    assert "groups: got 0" in says("--groups", "0")
    assert "needs calibration data, got none" in says("--source", "x=none")
    assert "a plain source or a sum" in says("--source", "x=minimax(self+random)")
    assert not (place / "never").exists()


def test_global_state_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    run(draw_arguments(place, *WANDA))
    assert torch.equal(torch.get_rng_state(), state)
