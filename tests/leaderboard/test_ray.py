"""Ray: the same records as without it, also when a process dies, and without a shared disk."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard import ray_engine
from lm_calib_plugin.leaderboard.cells import Cell, cells_of
from lm_calib_plugin.leaderboard.grid import check_grid
from lm_calib_plugin.leaderboard.progress import Bar
from lm_calib_plugin.leaderboard.records import Record, Records
from lm_calib_plugin.leaderboard.run import Bench
from lm_calib_plugin.leaderboard.start import Where, run_grid
from tests.leaderboard.fakes import fake_record, lasting, light_cells
from tests.leaderboard.tiny_grid import tiny_grid

ROOT = Path(__file__).parents[2]
CELLS = light_cells()


def dying_once(logs: Path) -> Callable[[Cell], Record]:
    """Measure cells; the process is killed at the second one, once."""
    bench, mark = Bench(logs), logs.parent / "died"

    def measure(cell: Cell) -> Record:
        if cell.method == "sparsegpt" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return bench.measure(cell)

    return measure


def fake(logs: Path) -> Callable[[Cell], Record]:
    return fake_record


def test_groups_share_a_model_and_a_draw() -> None:
    groups = ray_engine.groups_of(CELLS)
    assert [cell for group in groups for cell in group] == CELLS
    assert [len(group) for group in groups] == [1] + [2] * 9
    for group in groups:
        assert len({(c.model, c.calibration, c.draw) for c in group}) == 1


def test_resources_are_read() -> None:
    assert ray_engine.resources_of(None) == {}
    assert ray_engine.resources_of("CPU=2, GPU=0.5,big=1") == {"CPU": 2, "GPU": 0.5, "big": 1}


def test_without_ray_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lm-calib-plugin\[ray\]'"):
        run_grid(CELLS, tmp_path / "out", Where(engine="ray"))
    assert not (tmp_path / "out").exists()


def test_records_of_workers_without_our_disk_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    away = tmp_path / "on" / "another" / "machine"
    place = {"folder": str(tmp_path), "threads": "1"}
    group = ray_engine.groups_of(CELLS)[1]
    text = ray_engine.cells_text(group)
    texts = ray_engine._run_group(text, str(away), "ray-test", 0, place, fake)
    assert not away.exists()
    records = Records(tmp_path / "here")
    ray_engine.take(texts, group, records)
    assert list(records.read_all(c.key for c in group)) == [fake_record(c) for c in group]
    with pytest.raises(UserError, match="another cell"):
        ray_engine.take(texts, CELLS[:1], records)
    with pytest.raises(UserError, match="cannot be used"):
        ray_engine.take([texts[0].replace("0.5", "0.6")], group, records)


def test_an_error_of_a_group_is_told_and_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class RayError(Exception):
        pass

    def get(task: int) -> list[str]:
        if task == 1:
            raise RayError("long story\nDisk full")
        return [fake_record(cell).to_text() for cell in groups[task]]

    groups = dict(enumerate(ray_engine.groups_of(CELLS)))
    ray: Any = SimpleNamespace(
        wait=lambda tasks, timeout: (tasks[:1], tasks[1:]),
        get=get,
        exceptions=SimpleNamespace(RayError=RayError),
    )
    records = Records(tmp_path)
    with Bar(CELLS, tmp_path, quiet=True) as bar:
        errors = ray_engine._collected(ray, groups, records, bar)
    assert errors == [f"{groups[1][0].title} and 1 more: Disk full"]
    assert "Disk full" in capsys.readouterr().err
    assert len(list(records.read_all(c.key for c in CELLS))) == len(CELLS) - 2


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_cluster_gives_the_records_of_a_plain_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    content = tiny_grid(tmp_path) | {"draws": 1, "controls": False, "tasks": ["t_choice"]}
    content["calibrations"] = {"ids": "random"}
    cells = cells_of(check_grid(content))
    assert [cell.method for cell in cells] == ["dense", "wanda", "sparsegpt"]
    out = tmp_path / "out"
    ray_engine.run_on_ray(cells, out, measure=dying_once)
    assert (out / "died").exists()
    assert not {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"} & set(os.environ)
    found = list(Records(out).read_all(c.key for c in cells))
    bench = Bench(tmp_path / "logs")
    assert [lasting(r) for r in found] == [lasting(bench.measure(cell)) for cell in cells]
    assert not list(out.rglob("ray-*"))
    assert not list(out.rglob("*.trials"))
    assert "Traceback" not in capfd.readouterr().err
