"""``lm-calib leaderboard run``: exit codes, what is said at the end, and where cells go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin import cli
from lm_calib_plugin.leaderboard import run, workers
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.claims import Claims
from lm_calib_plugin.leaderboard.local import place_of
from lm_calib_plugin.leaderboard.records import FAILED, Record
from lm_calib_plugin.leaderboard.start import Where, outcome, run_grid
from tests.leaderboard.fakes import fake_record, light_cells

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "leaderboards"
GRID = """
name: light
models: [no/model]
methods: [wanda, sparsegpt]
levels: [50%]
calibrations: [self]
controls: false
draws: 2
tasks: [none]
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(GRID)
    return tmp_path


def fake(monkeypatch: pytest.MonkeyPatch, measure: Any = fake_record) -> None:
    monkeypatch.setattr(run.Bench, "measure", lambda self, cell: measure(cell))


def lm_calib(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["leaderboard", *words])
    told = capsys.readouterr()
    return int(str(end.value.code or 0)), told.out, told.err


def broken(cell: Cell) -> Record:
    if cell.method == "wanda":
        return Record(cell.key, place_of(cell), cell.identity(), FAILED, error="it broke")
    return fake_record(cell)


def test_all_done_is_0_and_says_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch)
    code, out, err = lm_calib(capsys, "run", "grid.yaml", "--quiet")
    assert (code, out) == (0, "5 of 5 cells are done in leaderboards/light\n")
    assert "cells " not in err
    assert lm_calib(capsys, "run", "grid.yaml")[0] == 0


def test_failed_cells_are_1_until_they_are_run_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, broken)
    for _ in range(2):
        code, out, _ = lm_calib(capsys, "run", "grid.yaml", "--quiet")
        assert code == 1
        assert out.startswith("3 of 5 cells are done in leaderboards/light; 2 failed (")
        assert "--retry-failed" in out
    fake(monkeypatch)
    assert lm_calib(capsys, "run", "grid.yaml", "--quiet")[0] == 1
    assert lm_calib(capsys, "run", "grid.yaml", "--quiet", "--retry-failed")[0] == 0


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_is_stopped_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def measure(cell: Cell) -> Record:
        if cell.method == "sparsegpt":
            os.kill(os.getpid(), number)
        return fake_record(cell)

    fake(monkeypatch, measure)
    found = lm_calib(capsys, "run", "grid.yaml", "--quiet")
    assert found == (code, "", "stopped; the same command goes on from here\n")
    fake(monkeypatch)
    assert lm_calib(capsys, "run", "grid.yaml", "--quiet")[0] == 0


def test_cells_of_others_are_named_and_those_left_are_1(tmp_path: Path) -> None:
    cells = light_cells()
    with Claims(tmp_path).claim(cells[0].key):
        Claims(tmp_path).begin(cells[0].key, 0)
        found = outcome(cells[:1], tmp_path)
        assert (found.code, "1 are measured by another process" in found.words) == (0, True)
        found = outcome(cells, tmp_path)
        assert found.code == 1
        assert "18 are left; the same command goes on" in found.words


def test_jobs_work_on_their_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, seen = light_cells(), list[Any]()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(workers, "run_workers", lambda *given, **options: seen.append(given))
    run_grid(cells, tmp_path, Where(jobs="2", shard="2/3"))
    ((own, folder, jobs),) = seen
    assert own == cells[6:12]
    assert (folder, jobs) == (tmp_path, 2)


def test_plan_and_status_import_nothing_heavy() -> None:
    code = "import sys; from lm_calib_plugin import cli\n"
    code += "try: cli.main(['leaderboard', sys.argv[1], 'grid.yaml'])\n"
    code += "except SystemExit as end: assert not end.code\n"
    code += "print('heavy', [m for m in ('torch', 'transformers', 'lm_eval', 'datasets', 'ray')"
    code += " if m in sys.modules])"
    for command in ("plan", "status"):
        done = subprocess.run(
            [sys.executable, "-c", code, command],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.endswith("heavy []\n"), done.stderr
    assert not Path("leaderboards").exists()


@pytest.mark.parametrize("script", ["shards.sh", "slurm_array.sh"])
def test_scripts_of_the_examples_run_every_shard(script: str, tmp_path: Path) -> None:
    """With an ``lm-calib`` and an ``srun`` that note what they are asked for."""
    note = tmp_path / "lm-calib"
    note.write_text(
        '#!/usr/bin/env bash\necho "$@" >> calls.txt\n'
        '[ "$2" = run ] || exit 0\n'
        'while [ $# -gt 0 ]; do [ "$1" = --out ] && mkdir -p "$2/records" && '
        'touch "$2/records/$RANDOM$RANDOM.json"; shift; done; exit 0\n'
    )
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\nexec "$@"\n')
    for file in (note, tmp_path / "srun"):
        file.chmod(0o755)
    own = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "GRID": "grid.yaml"}
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    subprocess.run(["bash", str(EXAMPLES / script)], env={**os.environ, **own, **array}, check=True)
    calls = (tmp_path / "calls.txt").read_text()
    if script == "slurm_array.sh":
        assert calls.count("\n") == 1
        assert "leaderboard run grid.yaml --shard 3/4" in calls
    else:
        assert "--shard 1/2" in calls
        assert "--shard 2/2" in calls
        assert "leaderboard report grid.yaml" in calls
        assert len(list(Path("leaderboards/merged/records").glob("*.json"))) == 2
