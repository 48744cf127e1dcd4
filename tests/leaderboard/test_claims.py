"""Locks on cells, and how often each was begun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lm_calib_plugin.leaderboard.claims import Claims

KEY = "ab" * 32
HOLD = """
import sys, time
from pathlib import Path
from lm_calib_plugin.leaderboard.claims import Claims
claims = Claims(Path(sys.argv[1]))
with claims.claim(sys.argv[2]) as mine:
    claims.begin(sys.argv[2], 0)
    print(mine, flush=True)
    time.sleep(60)
"""


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def test_a_cell_is_held_by_one_process_and_free_when_that_is_killed(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), KEY], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with claims.claim(KEY) as mine:
            assert not mine
        assert claims.is_held(KEY)
    finally:
        other.kill()
        other.communicate()
    assert not claims.is_held(KEY)
    with claims.claim(KEY) as mine:
        assert mine
        assert claims.begun(KEY) == 1


def test_begun_is_counted_until_there_is_a_record(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    for before in range(3):
        assert claims.begun(KEY) == before
        claims.begin(KEY, before)
    assert claims.begun(KEY) == 3
    claims.undo(KEY, 2)
    assert claims.begun(KEY) == 2
    claims.end(KEY)
    assert claims.begun(KEY) == 0
    claims.begin(KEY, 0)
    claims.undo(KEY, 0)
    assert claims.begun(KEY) == 0


def test_looking_writes_nothing(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "none")
    assert not claims.is_held(KEY)
    assert claims.begun(KEY) == 0
    assert not (tmp_path / "none").exists()
    with claims.claim(KEY):
        claims.begin(KEY, 0)
        before = files(tmp_path)
        assert claims.is_held(KEY)
    assert not claims.is_held(KEY)
    assert files(tmp_path) == before


def test_a_damaged_count_is_none(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    claims.begin(KEY, 2)
    next(tmp_path.rglob("*.trials")).write_text("many")
    assert claims.begun(KEY) == 0
