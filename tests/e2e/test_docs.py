"""The commands of README and guide are understood as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin import bank_commands, calibrate, preflight
from lm_calib_plugin.cli import main

ROOT = Path(__file__).parents[2]
WORKS = ("calibrate", "preflight", "bank", "draws")


def commands() -> list[str]:
    """Return every command line of the four that build and judge sets, continuations joined."""
    found = []
    for file in (ROOT / "README.md", ROOT / "docs" / "calibration.md"):
        for block in re.findall(r"```bash\n(.*?)```", file.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split()
                if words[:1] == ["lm-calib"] and words[1] in WORKS and " ... " not in line:
                    found.append(" ".join(words))
    return found


def test_there_are_commands() -> None:
    assert {line.split()[1] for line in commands()} == set(WORKS)


@pytest.mark.parametrize("line", commands())
def test_the_command_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []

    class Answer:
        def table(self) -> str:
            return "table"

    def note(*given: Any, **options: Any) -> Any:
        done.append((given, options))
        return Answer()

    monkeypatch.setattr(calibrate, "calibrate", note)
    monkeypatch.setattr(preflight, "preflight", note)
    monkeypatch.setattr(bank_commands, "fill", note)
    monkeypatch.setattr(bank_commands, "study_draws", note)
    monkeypatch.chdir(tmp_path)
    text = line.replace("$D", "texts").replace("$s", "0").replace('"$EXPR"', "self")
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(text)[1:])
    assert ended.value.code in (None, 0)
    assert len(done) == 1
