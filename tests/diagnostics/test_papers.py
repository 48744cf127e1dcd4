"""Files of examples/papers: each says what it is, plans the paper's settings, and runs small."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import saved_model

FOLDER = Path(__file__).parents[2] / "examples" / "papers"
FILES = sorted(path.stem for path in FOLDER.glob("*_[0-9]*.py"))
PAPERS = (
    "2410.17711", "2405.20835", "2311.09755", "2410.17170", "2409.11233", "2407.16286",
    "2403.06408", "2307.08072", "2402.05147", "2402.04333", "2506.12044",
)  # fmt: skip
SMALL = ["--nsamples", "4", "--seqlen", "16", "--eval-samples", "4", "--quiet"]
WIDE = ["--group-size", "-1"]
MORE = {
    "activations_2402_05147": WIDE,
    "depth_2407_16286": ["--no-ranking", "--blocks", "1"],
    "divergence_2409_11233": ["--fractions", "0.5"],
    "draws_2311_09755": ["--draws", "2"],
    "less_2402_04333": ["--pool", "8"],
    "why_inputs_break_2506_12044": [*WIDE, "--methods", "rtn,gptq"],
}
# What these do is a command of its own, tested where it lives.
COMMANDS = {
    "perturbation_2403_06408": ["--noise", "gaussian", *WIDE],
    "emergent_2307_08072": WIDE,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options with two small texts of words that the tiny tokenizer knows."""
    folder, found = tmp_path_factory.mktemp("texts"), []
    for option, words in (("--text", ["the", "of", "and", "to"]), ("--other", [*"bcdefgh"])):
        parts = [" ".join((words * 12)[i : i + 40]) + f" {i}" for i in range(60)]
        path = folder / f"{words[0]}.txt"
        path.write_text("\n\n\n".join(parts))
        found += [option, f"file:{path}?split=blanks"]
    return found


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What loads a file by its name, with its folder on the path as when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("common", *FILES):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def test_every_paper_has_a_file_and_a_row() -> None:
    numbers = [re.sub(r".*_(\d{4})_(\d{5})$", r"\1.\2", name) for name in FILES]
    assert sorted(numbers) == sorted(PAPERS)
    rows = (FOLDER / "README.md").read_text()
    for number, name in zip(numbers, FILES, strict=True):
        assert re.search(rf"\[{number}\]\(https://arxiv.org/abs/{number}\).*`{name}\.py`", rows)


@pytest.mark.parametrize("name", FILES)
def test_help_and_plan(name: str, paper: Any, capsys: Any) -> None:
    module = paper(name)
    about = " ".join(module.__doc__.split())
    number = module.PAPER.arxiv
    assert f"arXiv {number}" in about
    assert "Claim:" in about
    assert "Reproduced:" in about
    assert "Not reproduced here:" in about
    common = importlib.import_module("common")
    with pytest.raises(SystemExit) as end:
        common.main(about, module.PAPER, module.small, ["--help"])
    assert end.value.code == 0
    assert "--paper-settings" in capsys.readouterr().out
    common.main(about, module.PAPER, module.small, ["--paper-settings", "--plan"])
    plan = capsys.readouterr().out
    assert f"https://arxiv.org/abs/{number}" in plan
    assert "leaderboard run" in plan or "seqlen = 2048" in plan


@pytest.mark.parametrize("name", [name for name in FILES if name not in COMMANDS])
def test_small_version_runs(
    name: str, paper: Any, model: str, texts: list[str], tmp_path: Path, capsys: Any
) -> None:
    module = paper(name)
    common = importlib.import_module("common")
    words = ["--pretrained", model, "--device", "cpu", *texts, *SMALL, *MORE.get(name, [])]
    common.main(module.__doc__, module.PAPER, module.small, [*words, "--out", str(tmp_path)])
    assert "\n* " in capsys.readouterr().out
    assert list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_commands_are_typed_as_the_command_takes_them(
    name: str, paper: Any, model: str, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_calib_plugin import cli

    module = paper(name)
    common = importlib.import_module("common")
    asked: list[list[str]] = []
    monkeypatch.setattr(common, "run", asked.append)
    words = ["--pretrained", model, "--device", "cpu", *texts, *SMALL, *COMMANDS[name]]
    common.main(module.__doc__, module.PAPER, module.small, words)
    assert asked[0][:2] == ["inspect", "sensitivity"]
    known = subprocess.run(
        [sys.executable, "-m", "lm_calib_plugin", "inspect", "sensitivity", "--help"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if "--probe" not in known:
        pytest.skip("the command is not there yet")
    with pytest.raises(SystemExit) as end:
        cli.main(asked[0])
    assert end.value.code in (0, None)


def test_own_texts_are_documents_of_this_project(paper: Any) -> None:
    common = paper("common")
    from lm_calib_plugin.calibration.sources.text_files import open_documents

    for expression in common._own_texts().values():
        documents = open_documents(Path(expression.removeprefix("file:")), "text")
        assert len(documents) > 100


def test_bad_input_is_a_short_message(paper: Any, model: str) -> None:
    module = paper("self_calibration_2410_17170")
    common = importlib.import_module("common")
    with pytest.raises(SystemExit, match="error: "):
        common.main(
            module.__doc__, module.PAPER, module.small,
            ["--pretrained", model, "--text", "nosource:x", "--quiet"],
        )  # fmt: skip
