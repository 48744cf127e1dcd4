"""The commands of README and guide are understood as they stand there."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin import bank_commands, calibrate, preflight
from lm_calib_plugin.cli import main
from lm_calib_plugin.diagnostics import answers, divergence, generation, sensitivity
from lm_calib_plugin.diagnostics.activations import asking
from lm_calib_plugin.diagnostics.layers import reading
from lm_calib_plugin.export import bitmask, command, look
from lm_calib_plugin.leaderboard import analysis, gate, report, start, verify
from lm_calib_plugin.leaderboard.tables import Analysis
from tests.tiny import saved_model

ROOT = Path(__file__).parents[2]
WORKS = ("calibrate", "preflight", "bank", "draws", "export", "inspect", "pack", "unpack", "cache")
GUIDES = ("calibration.md", "diagnostics.md", "export.md", "leaderboards.md")
# What a command of diagnostics calls as soon as all of its arguments are found good.
DIAGNOSES = {
    "activations": (asking, "inspected"),
    "answers": (answers, "read_answers"),
    "divergence": (divergence, "diagnose"),
    "generation": (generation, "diagnose"),
    "layers": (reading, "read_run"),
    "sensitivity": (sensitivity, "inspect_sensitivity"),
}


def commands(works: tuple[str, ...] = WORKS) -> list[str]:
    """Return every command line of ours that does more than show something, each once."""
    found: list[str] = []
    for file in (ROOT / "README.md", *(ROOT / "docs" / name for name in GUIDES)):
        for block in re.findall(r"```bash\n(.*?)```", file.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.partition(" #")[0].split()
                diagnoses = words[1:2] == ["inspect"] and words[2] in DIAGNOSES
                name = "diagnoses" if diagnoses else "".join(words[1:2])
                if words[:1] == ["lm-calib"] and name in works and " ... " not in line:
                    found.append(" ".join(words))
    return list(dict.fromkeys(found))


def test_tables_of_performance_are_those_of_the_results() -> None:
    file = ROOT / "benchmarks" / "performance_table.py"
    spec = importlib.util.spec_from_file_location("performance_table", file)
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- table ") == len(tables.TABLES)
    assert tables.filled(page) == page


@pytest.mark.parametrize("name", GUIDES)
def test_nothing_is_left_to_fill_in(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert not re.search(r"@@|TODO|XXX", text)
    for target in re.findall(r"\]\(((?!https?:|#)[^)#]+)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_there_are_commands() -> None:
    assert {line.split()[1] for line in commands()} == set(WORKS)


@pytest.mark.parametrize("line", commands())
def test_the_command_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []

    class Answer:
        whole, archive, folder, files, bytes = True, 1, 2, (), 3

        def table(self) -> str:
            return "table"

    def note(*given: Any, **options: Any) -> Any:
        done.append((given, options))
        return Answer()

    monkeypatch.setattr(calibrate, "calibrate", note)
    monkeypatch.setattr(preflight, "preflight", note)
    monkeypatch.setattr(bank_commands, "fill", note)
    monkeypatch.setattr(bank_commands, "study_draws", note)
    monkeypatch.setattr(command, "export", note)
    monkeypatch.setattr(look, "look", note)
    monkeypatch.setattr(bitmask, "pack_folder", note)
    monkeypatch.setattr(bitmask, "unpack_folder", note)
    monkeypatch.chdir(tmp_path)
    if line.split()[1] == "cache":
        note()
    text = line.replace("$D", "texts").replace("$s", "0").replace('"$EXPR"', "self")
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(text)[1:])
    assert ended.value.code in (None, 0)
    assert len(done) == 1


@pytest.mark.parametrize("line", commands(("diagnoses",)))
def test_the_diagnosis_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        pass

    def reached(*given: Any, **options: Any) -> Any:
        raise Reached

    (tmp_path / "code.txt").write_text("x = 1\n" * 1000)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    monkeypatch.setattr(*DIAGNOSES[words[2]], reached)
    with pytest.raises(Reached):
        main(words[1:])


def test_every_diagnosis_is_in_the_guide() -> None:
    assert {line.split()[2] for line in commands(("diagnoses",))} == set(DIAGNOSES)


@pytest.mark.parametrize("line", commands(("leaderboard",)))
def test_the_command_about_leaderboards_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    done: list[Any] = []

    def note(*given: Any, **options: Any) -> Any:
        done.append((given, options))
        return start.Outcome("done", 0)

    monkeypatch.setattr(start, "run_grid", note)
    monkeypatch.setattr(report, "write_report", note)
    monkeypatch.setattr(analysis, "analyze", lambda *given: Analysis("", "", (), ()))
    monkeypatch.setattr(verify, "chosen", lambda *given, **options: [])
    monkeypatch.setattr(gate, "shortfalls", lambda *given: [])
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line)[1:])
    assert ended.value.code in (None, 0)
    verb = line.split()[2]
    assert len(done) == (verb in ("run", "report"))
    assert capsys.readouterr().out


def test_python_of_the_guide_to_exports_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved_model(tmp_path / "model", max_position_embeddings=512)
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        code = block.replace('"builtin:smollm2-135m"', repr(model))
        code = code.replace('builtin_model("smollm2-135m")', repr(model))
        exec(compile(code, "export.md", "exec"), {})
    told = capsys.readouterr().out
    assert "'sparsity': 0.5" in told
    assert "magnitude: 21 layers, 50.00% removed" in told
