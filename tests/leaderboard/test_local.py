"""Cells in one process, with fake measurements: order, resuming, what goes wrong."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lm_calib_plugin.leaderboard import local
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.claims import TRIALS, Claims
from lm_calib_plugin.leaderboard.records import FAILED, Record, Records
from tests.leaderboard.fakes import fake_record, light_cells

CELLS = light_cells()


def failing(cell: Cell) -> Record:
    return Record(cell.key, local.place_of(cell), cell.identity(), FAILED, error="it broke")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 19, 40])
def test_shards_are_parts_that_make_the_whole(count: int) -> None:
    parts = [local.shard_of(CELLS, f"{n}/{count}") for n in range(1, count + 1)]
    assert [cell for part in parts for cell in part] == CELLS
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert local.shard_of(CELLS, None) == CELLS


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_worker_begins_with_its_part_and_helps_with_all_others(count: int) -> None:
    for number in range(1, count + 1):
        order = local.order_of(CELLS, number, count)
        own = local.shard_of(CELLS, f"{number}/{count}")
        assert order[: len(own)] == own
        assert sorted(c.key for c in order) == sorted(c.key for c in CELLS)
    if count == 2:
        # The helper comes from the other side of a part.
        order = local.order_of(CELLS, 1, 2)
        assert order[len(local.shard_of(CELLS, "1/2"))] == CELLS[-1]


def test_cells_are_the_same_for_another_process() -> None:
    found = local.cells_from(local.cells_text(CELLS))
    assert found == CELLS
    assert [c.key for c in found] == [c.key for c in CELLS]
    assert [c.command() for c in found] == [c.command() for c in CELLS]


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    seen: list[str] = []

    def measure(cell: Cell) -> Record:
        seen.append(cell.key)
        return fake_record(cell)

    assert local.run_cells(CELLS[:4], tmp_path, measure) == 4
    assert local.run_cells(CELLS, tmp_path, measure) == len(CELLS) - 4
    assert local.run_cells(CELLS, tmp_path, measure) == 0
    assert seen == [cell.key for cell in CELLS]
    assert not list(tmp_path.rglob("*.trials"))
    assert list(Records(tmp_path).read_all(c.key for c in CELLS)) == [
        fake_record(cell) for cell in CELLS
    ]


def test_what_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    with Claims(tmp_path).claim(CELLS[2].key):
        assert local.run_cells(CELLS, tmp_path, fake_record) == len(CELLS) - 1
    assert local.waiting(CELLS, Records(tmp_path)) == [CELLS[2]]


def test_what_was_held_is_looked_at_again(tmp_path: Path) -> None:
    """Its process may have died meanwhile."""
    holding = Claims(tmp_path).claim(CELLS[0].key)
    holding.__enter__()

    def measure(cell: Cell) -> Record:
        if cell is CELLS[5]:
            holding.__exit__(None, None, None)
        return fake_record(cell)

    assert local.run_cells(CELLS, tmp_path, measure) == len(CELLS)


def test_failed_cells_stop_nothing_and_are_run_again_when_asked(tmp_path: Path) -> None:
    def measure(cell: Cell) -> Record:
        return failing(cell) if cell is CELLS[1] else fake_record(cell)

    assert local.run_cells(CELLS, tmp_path, measure) == len(CELLS)
    assert local.run_cells(CELLS, tmp_path, fake_record) == 0
    assert local.forget_failed(CELLS, tmp_path) == 1
    assert local.run_cells(CELLS, tmp_path, fake_record) == 1
    assert local.forget_failed(CELLS, tmp_path) == 0


def test_a_cell_that_ends_its_process_several_times_has_failed(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    claims.begin(CELLS[0].key, TRIALS - 1)
    assert local.run_cells(CELLS[:2], tmp_path, fake_record) == 2
    first, second = Records(tmp_path).read_all(c.key for c in CELLS[:2])
    assert first.status == FAILED
    assert f"ended {TRIALS} times" in (first.error or "")
    assert first.cell["title"] == CELLS[0].title
    assert second == fake_record(CELLS[1])
    assert local.forget_failed(CELLS, tmp_path) == 1
    assert local.run_cells(CELLS[:1], tmp_path, fake_record) == 1  # it has all its trials again


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_who_is_stopped_gives_the_cell_back(tmp_path: Path, error: type[BaseException]) -> None:
    def measure(cell: Cell) -> Record:
        raise error

    for _ in range(TRIALS + 2):
        with pytest.raises(error):
            local.run_cells(CELLS[:1], tmp_path, measure)
    assert local.run_cells(CELLS[:1], tmp_path, fake_record) == 1


@pytest.mark.parametrize("step", ["begin", "end"])
def test_who_is_stopped_between_two_lines_blames_no_cell(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may come right after the note that a cell is begun, or right before it goes."""
    plain = getattr(Claims, step)
    stops = [local.Stopped()]

    def stopped(self: Claims, key: str, *arguments: int) -> None:
        if step == "begin":
            plain(self, key, *arguments)
        if stops:
            raise stops.pop()
        if step == "end":
            plain(self, key)

    monkeypatch.setattr(Claims, step, stopped)
    with pytest.raises(local.Stopped):
        local.run_cells(CELLS[:1], tmp_path, fake_record)
    assert not list(tmp_path.rglob("*.trials"))
    assert local.run_cells(CELLS[:1], tmp_path, fake_record) == int(step == "begin")


def test_the_signal_of_schedulers_is_a_ctrl_c(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def measure(cell: Cell) -> Record:
        os.kill(os.getpid(), signal.SIGTERM)
        return fake_record(cell)

    with pytest.raises(local.Stopped), local.stoppable():
        local.run_cells(CELLS, tmp_path, measure)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not Claims(tmp_path).begun(CELLS[0].key)


def test_shards_merge_by_copying_records(tmp_path: Path) -> None:
    local.run_cells(CELLS, tmp_path / "all", fake_record)
    merged = tmp_path / "merged" / "records"
    merged.mkdir(parents=True)
    for number in (3, 1, 2):
        own = tmp_path / str(number)
        local.run_cells(local.shard_of(CELLS, f"{number}/3"), own, fake_record)
        for file in (own / "records").glob("*.json"):
            (merged / file.name).write_bytes(file.read_bytes())
    names = {file.name: file.read_bytes() for file in merged.iterdir()}
    assert names == {f.name: f.read_bytes() for f in (tmp_path / "all" / "records").iterdir()}
    assert local.run_cells(CELLS, tmp_path / "merged", fake_record) == 0
