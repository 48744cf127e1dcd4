"""What is told of a run under way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lm_calib_plugin.leaderboard.claims import Claims
from lm_calib_plugin.leaderboard.local import place_of
from lm_calib_plugin.leaderboard.progress import duration, estimate, expected_seconds
from lm_calib_plugin.leaderboard.records import FAILED, Record, Records
from lm_calib_plugin.leaderboard.status import status_lines
from tests.leaderboard.fakes import fake_record, light_cells

CELLS = light_cells()


def test_nothing_done_is_told_without_writing(tmp_path: Path) -> None:
    lines = list(status_lines(CELLS, tmp_path))
    assert lines[0].split() == ["done", "failed", "running", "open", "s/cell"]
    assert [line.split() for line in lines[1:4]] == [
        ["no/model,", "dense", "0", "0", "0", "1", "-"],
        ["no/model,", "wanda", "0", "0", "0", "9", "-"],
        ["no/model,", "sparsegpt", "0", "0", "0", "9", "-"],
    ]
    assert lines[-1].startswith("19 cells: 0 done, 0 failed, 19 open; no estimate")
    assert not list(tmp_path.iterdir())


def test_every_state_is_told(tmp_path: Path) -> None:
    records, claims = Records(tmp_path), Claims(tmp_path)
    wanda = [cell for cell in CELLS if cell.method == "wanda"]
    for cell in wanda[:3]:
        records.write(fake_record(cell))
    failed, running, died = wanda[3:6]
    records.write(
        Record(
            failed.key,
            place_of(failed),
            failed.identity(),
            FAILED,
            error="it broke",
            costs={"seconds": {"failed": 4.0}},
        )
    )
    with claims.claim(died.key):
        claims.begin(died.key, 0)
    with claims.claim(running.key):
        claims.begin(running.key, 0)
        lines = list(status_lines(CELLS, tmp_path))
    assert lines[2].split() == ["no/model,", "wanda", "3", "1", "1", "4", "2.0"]
    assert f"failed {failed.key[:16]} {failed.title}: it broke" in lines
    assert f"running {running.key[:16]} {running.title}" in lines
    assert any(
        line.startswith(f"open {died.key[:16]}") and "no process is at work" in line
        for line in lines
    )
    # 15 open cells of 2 s each; 3 x 2 s and 4 s spent.
    assert lines[-1].endswith("15 open; about 30 s in one process; 10 s of work so far")


def test_time_left_is_told_from_cells_of_the_same_method() -> None:
    wanda, sparsegpt = ([c for c in CELLS if c.method == name] for name in ("wanda", "sparsegpt"))
    seconds = {"tasks": 1.0, "model": 2.0, "evaluation": 3.0, "base": 50.0, "compression.x": 9.0}
    slow = replace(fake_record(sparsegpt[0]), costs={"seconds": seconds})
    measured = [fake_record(wanda[0]), slow]
    assert expected_seconds(CELLS[:1], []) is None
    assert expected_seconds([*wanda[1:3], sparsegpt[1]], measured) == 2 + 2 + 6
    assert expected_seconds(CELLS[:1], measured) == 4  # the median of all


def test_durations_are_for_people(tmp_path: Path) -> None:
    assert [duration(s) for s in (3.4, 80, 600, 12600)] == ["3 s", "80 s", "10 min", "3.5 h"]
    assert estimate(CELLS, Records(tmp_path)).endswith(
        "no estimate before the first cells are done"
    )
