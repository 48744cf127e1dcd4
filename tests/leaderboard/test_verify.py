"""Cells that are run again: the same is the same, and what differs is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lm_calib_plugin import cli
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard import verify
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.local import run_cells
from lm_calib_plugin.leaderboard.records import Metric, Record, Records
from tests.leaderboard.fakes import fake_record, light_cells
from tests.leaderboard.tiny_grid import tiny_grid, write_grid

CELLS = light_cells()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run_cells(CELLS, tmp_path, fake_record)
    return tmp_path


def checked(folder: Path, measure: Callable[[Cell], Record]) -> list[str]:
    (check,) = verify.verify(CELLS[:1], folder, measure)
    return list(check.lines())


def test_the_same_is_the_same(folder: Path) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*.json")}
    costly = checked(folder, lambda c: replace(fake_record(c), costs={"seconds": {"x": 9.0}}))
    assert costly == [f"same {CELLS[0].key[:16]} {CELLS[0].title}: every value, bit by bit"]
    assert {p: p.read_bytes() for p in folder.rglob("*.json")} == before


def test_what_differs_is_named_with_its_size(folder: Path) -> None:
    def other(cell: Cell) -> Record:
        record = fake_record(cell, 0.5)
        task = record.tasks["none"]
        metric = Metric(0.25, True, items=[0.5, 0.0])
        costs = {"versions": {"torch": "9.9"}, "machine": {"threads": 64}}
        changed = replace(task, items_digest="other", metrics={"acc": metric})
        return replace(record, tasks={"none": changed}, costs=costs)

    lines = checked(folder, other)
    assert lines[0].startswith("differs ")
    assert "  tasks.none.items_digest: d then, other now" in lines
    assert "  tasks.none.metrics.acc.items: 1 of 2 values, by up to 0.5" in lines
    assert "  tasks.none.metrics.acc.value: 0.5 then, 0.25 now, by 0.25" in lines
    assert lines[-1].startswith("  what else differs: ")
    assert "torch none then, 9.9 now" in lines[-1]
    assert "threads none then, 64 now" in lines[-1]
    assert len(lines) == 5


def test_weights_and_calibration_count_and_versions_alone_do_not(folder: Path) -> None:
    first = replace(
        fake_record(CELLS[0]), compression={"weights_digest": "a", "versions": {"x": 1}}
    )
    Records(folder).write(first)
    same = replace(first, compression={"weights_digest": "a", "versions": {"x": 2}})
    assert checked(folder, lambda c: same)[0].startswith("same")
    other = replace(first, compression={"weights_digest": "b", "versions": {"x": 1}})
    assert "  compression.weights_digest: a then, b now" in checked(folder, lambda c: other)


def test_a_seed_chooses_cells(folder: Path) -> None:
    once = verify.chosen(CELLS, folder, seed=3, count=4)
    assert once == verify.chosen(CELLS, folder, seed=3, count=4)
    assert len({c.key for c in once}) == 4
    picked = {verify.chosen(CELLS, folder, seed=n)[0].key for n in range(60)}
    assert len(picked) > len(CELLS) / 2
    assert len(verify.chosen(CELLS, folder, count=99)) == len(CELLS)


def test_a_cell_is_named_by_key_or_title(folder: Path) -> None:
    cell = CELLS[4]
    assert verify.chosen(CELLS, folder, name=cell.key[:10]) == [cell]
    assert verify.chosen(CELLS, folder, name=cell.title) == [cell]
    with pytest.raises(UserError, match=r"cell: 'wanda' is 9 done cells.*for instance"):
        verify.chosen(CELLS, folder, name="wanda")
    with pytest.raises(UserError, match="is no done cell"):
        verify.chosen(CELLS, folder, name="nothing")
    Records(folder).path(cell.key).unlink()
    with pytest.raises(UserError, match="is no done cell"):
        verify.chosen(CELLS, folder, name=cell.key[:10])


def test_earlier_results_are_out_of_sight(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache_dir / "models" / "m").mkdir(parents=True)
    (cache_dir / "self-generated").mkdir()
    with verify.afresh() as logs:
        own = Path(os.environ["LM_CALIB_CACHE"])
        assert [p.name for p in own.iterdir()] == ["models"]
        assert (own / "models" / "m").is_dir()
        assert not logs.is_relative_to(cache_dir)
    assert Path(os.environ["LM_CALIB_CACHE"]) == cache_dir
    assert (cache_dir / "models" / "m").is_dir()
    assert not own.exists()


def test_the_command_on_real_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = tiny_grid(tmp_path) | {"draws": 1, "controls": False, "calibrations": ["self"]}
    grid = str(write_grid(tmp_path / "grid.yaml", content | {"methods": ["wanda"]}))

    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["leaderboard", *words])
        return int(str(end.value.code or 0)), capsys.readouterr().out

    code, out = run("run", grid, "--quiet")
    assert (code, out) == (0, "2 of 2 cells are done in leaderboards/tiny\n")
    code, out = run("verify", grid, "--cell", "wanda")
    assert code == 0, out
    assert "every value, bit by bit" in out
    # A record that somebody else made, with other scores.
    (file,) = [
        p
        for p in Path("leaderboards/tiny/records").iterdir()
        if json.loads(p.read_text())["cell"]["role"] != "dense"
    ]
    record = Record.from_file(file)
    task = record.tasks["t_choice"]
    metric = replace(task.metrics["acc"], value=task.metrics["acc"].value + 0.125)
    changed = replace(task, metrics={**task.metrics, "acc": metric})
    file.write_text(replace(record, tasks={**record.tasks, "t_choice": changed}).to_text())
    before = file.read_bytes()
    code, out = run("verify", grid, "--count", "9", "--seed", "1")
    assert code == 1
    assert "differs " in out
    assert "tasks.t_choice.metrics.acc.value" in out
    assert "0.125" in out
    assert file.read_bytes() == before
