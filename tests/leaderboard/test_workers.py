"""Several processes on one folder: nothing twice, deaths survived, ended in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from lm_calib_plugin.leaderboard import workers
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.claims import TRIALS
from lm_calib_plugin.leaderboard.local import cells_text, place_of, waiting
from lm_calib_plugin.leaderboard.records import DONE, FAILED, Record, Records
from tests.leaderboard.fakes import fake_record, lasting, light_cells

ROOT = Path(__file__).parents[2]
# What a worker of these tests does; it notes every begin, so that nothing can be done twice unseen.
FAKE = """
import os, signal, sys, time
from lm_calib_plugin.leaderboard import workers
from tests.leaderboard.fakes import fake_record

def measure(logs):
    def one(cell):
        with open(logs.parent / "begun.txt", "a") as file:
            file.write(f"{cell.key} {os.getpid()}\\n")
        {behavior}
        return fake_record(cell)
    return one

if __name__ == "__main__":
    raise SystemExit(workers.work(sys.argv[1:], measure))
"""
PARENT = """
import sys
from pathlib import Path
from lm_calib_plugin.leaderboard.workers import run_workers
from tests.leaderboard.fakes import light_cells
run_workers(light_cells(), Path(sys.argv[1]), 2, command=sys.argv[2:])
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "POLL", 0.05)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def command(folder: Path, behavior: str = "pass") -> list[str]:
    script = folder / "worker.py"
    script.write_text(FAKE.replace("{behavior}", behavior))
    return [sys.executable, str(script)]


def begun(folder: Path) -> list[tuple[str, str]]:
    file = folder / "begun.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(key, process) for key, process in map(str.split, lines)]


def records(cells: Sequence[Cell], folder: Path) -> list[Record]:
    return list(Records(folder).read_all(c.key for c in cells))


def wait_for_begins(folder: Path, number: int, process: subprocess.Popen[bytes]) -> None:
    until(lambda: len(begun(folder)) >= number or process.poll() is not None)


def until(what: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_many_fast_cells_are_measured_once_by_several_processes(tmp_path: Path) -> None:
    cells = light_cells(draws=16, calibrations=4)
    assert len(cells) == 129
    workers.run_workers(cells, tmp_path, 3, command=command(tmp_path, "time.sleep(0.01)"))
    counted = Counter(key for key, _ in begun(tmp_path))
    assert counted == {cell.key: 1 for cell in cells}
    assert len({process for _, process in begun(tmp_path)}) == 3
    assert [lasting(r) for r in records(cells, tmp_path)] == [
        lasting(fake_record(cell)) for cell in cells
    ]


def test_a_killed_worker_is_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = light_cells()
    once = "once = logs.parent / 'died'\n        if not once.exists():\n"
    once += "            once.touch(); os.kill(os.getpid(), signal.SIGKILL)"
    workers.run_workers(cells, tmp_path, 2, command=command(tmp_path, once))
    assert [r.status for r in records(cells, tmp_path)] == [DONE] * len(cells)
    assert len(begun(tmp_path)) == len(cells) + 1
    said = capsys.readouterr().err
    assert "was ended by signal 9 (Killed); it is started again" in said


def test_a_cell_that_kills_is_recorded_as_failed_and_all_others_are_done(tmp_path: Path) -> None:
    cells = light_cells()
    deadly = cells[3].key
    behavior = f"if cell.key == '{deadly}': os.kill(os.getpid(), signal.SIGKILL)"
    workers.run_workers(cells, tmp_path, 2, command=command(tmp_path, behavior))
    found = records(cells, tmp_path)
    assert [r.key for r in found if r.status == FAILED] == [deadly]
    assert len(found) == len(cells)
    assert Counter(key for key, _ in begun(tmp_path))[deadly] == TRIALS


def test_a_worker_that_never_gets_anywhere_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = light_cells()
    broken = [sys.executable, "-c", "import sys; sys.exit('no such library')"]
    workers.run_workers(cells, tmp_path, 1, command=broken)
    assert len(waiting(cells, Records(tmp_path))) == len(cells)
    said = capsys.readouterr().err
    assert "ended with code 1: no such library" in said
    assert "4 times without a record: given up" in said


def test_a_failed_cell_is_told_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = light_cells()
    title = cells[2].title
    broken = Record(cells[2].key, place_of(cells[2]), cells[2].identity(), FAILED, error="it broke")
    Records(tmp_path).write(broken)
    workers.run_workers(cells, tmp_path, 2, command=command(tmp_path))
    assert len(records(cells, tmp_path)) == len(cells)
    assert f"failed: {title}" not in capsys.readouterr().err  # it had failed before
    assert cells[2].key not in [key for key, _ in begun(tmp_path)]


def test_workers_end_when_their_parent_is_killed_and_nothing_is_done_twice(tmp_path: Path) -> None:
    cells = light_cells()
    slow = command(tmp_path, "time.sleep(0.15)")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), *slow], stderr=subprocess.DEVNULL
    )
    until(lambda: len(list((tmp_path / "records").glob("*.json"))) >= 3)
    parent.kill()
    parent.wait()
    processes = {int(process) for _, process in begun(tmp_path)}

    def gone(process: int) -> bool:
        try:
            return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    if sys.platform == "linux":
        until(lambda: all(map(gone, processes)), 10.0)
    else:
        time.sleep(2.0)
    done = {r.key for r in records(cells, tmp_path)}
    assert 0 < len(done) < len(cells)
    before = len(begun(tmp_path))
    assert not list(tmp_path.rglob("*.trials"))  # who was stopped gave its cell back
    workers.run_workers(cells, tmp_path, 2, command=command(tmp_path))
    again = [key for key, _ in begun(tmp_path)[before:]]
    assert sorted(again) == sorted(c.key for c in cells if c.key not in done)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_ends_workers_in_order(tmp_path: Path) -> None:
    slow = command(tmp_path, "time.sleep(30)")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), *slow], stderr=subprocess.PIPE
    )
    until(lambda: len(begun(tmp_path)) == 2)
    start = time.monotonic()
    parent.send_signal(signal.SIGINT)
    parent.communicate()
    assert time.monotonic() - start < 10
    assert not list(tmp_path.rglob("*.trials"))
    for _, process in begun(tmp_path):
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


def test_whole_folder_killed_again_and_again_ends_with_the_same_records(tmp_path: Path) -> None:
    """Kills anywhere, also while a record is written; never is a cell with a record begun again."""
    cells = light_cells()
    script = command(tmp_path, "time.sleep(0.01)")
    script += [str(tmp_path), "1", "1", str(os.getpid())]
    (tmp_path / "logs").mkdir()
    for attempt in range(6):
        done = {r.key for r in records(cells, tmp_path)}
        before = len(begun(tmp_path))
        process = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert process.stdin is not None
        process.stdin.write(cells_text(cells).encode())
        process.stdin.close()
        wait_for_begins(tmp_path, before + 2, process)
        time.sleep(0.007 * attempt)
        process.kill()
        process.wait()
        assert not done & {key for key, _ in begun(tmp_path)[before:]}
    workers.run_workers(cells, tmp_path, 1, command=command(tmp_path))
    assert records(cells, tmp_path) == [fake_record(cell) for cell in cells]
    assert max(Counter(key for key, _ in begun(tmp_path)).values()) <= 2


# --- what a worker gets --------------------------------------------------------------------------


def test_jobs_are_the_gpus_unless_cells_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = light_cells()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7,5")
    assert workers.jobs_of("auto", cells) == (3, ["3", "GPU-7", "5"])
    assert workers.jobs_of("2", cells) == (2, ["3", "GPU-7", "5"])
    assert workers.jobs_of("1", cells) == (1, [])
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert workers.jobs_of("auto", cells) == (1, [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for place in ({"harness": {"device": "cpu"}}, {"loading": {"device": "cuda:1"}}):
        own = [Cell(**{**vars(cell), **place}) for cell in cells]
        assert workers.jobs_of("auto", own) == (1, [])
    spread = [Cell(**{**vars(cell), "loading": {"parallelize": True}}) for cell in cells]
    assert workers.jobs_of("auto", spread) == (1, [])


def test_workers_share_gpus_and_threads_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(workers, "_cores", lambda: 8)
    note = "names = ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')\n        "
    note += "open(logs.parent / f'{os.getpid()}.env', 'w').write(str([os.environ.get(n) for n in "
    note += "names])); time.sleep(0.3)"
    cells = light_cells()[:6]
    workers.run_workers(cells, tmp_path, 3, gpus=["4", "6"], command=command(tmp_path, note))
    found = sorted(file.read_text() for file in tmp_path.glob("*.env"))
    assert found == ["['4', '2']", "['4', '2']", "['6', '2']"]
    assert capsys.readouterr().err.count("3 workers, OMP_NUM_THREADS=2 each") == 1
