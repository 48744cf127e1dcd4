"""Real cells of a tiny model: what a record holds, and that nothing leaks from cell to cell."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin.leaderboard.cells import Cell, cells_of
from lm_calib_plugin.leaderboard.grid import check_grid
from lm_calib_plugin.leaderboard.records import DONE, FAILED, Record
from lm_calib_plugin.leaderboard.run import Bench
from lm_calib_plugin.leaderboard.scores import score_of
from tests.leaderboard.fakes import lasting
from tests.leaderboard.tiny_grid import tiny_grid

ROOT = Path(__file__).parents[2]
# The command line of the harness, without the list of all its tasks, which takes it a minute.
HARNESS = """
import contextlib, json, sys
from functools import partial
import lm_eval.tasks
lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
import lm_eval._cli.run
from lm_calib_plugin.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.suppress(SystemExit):
        main(["eval", *words])
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    return cells_of(check_grid(tiny_grid(tmp_path_factory.mktemp("board"))))


@pytest.fixture(scope="module")
def records(cells: list[Cell], tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """All cells, measured one after another."""
    bench = Bench(tmp_path_factory.mktemp("logs"))
    return [bench.measure(cell) for cell in cells]


def of(records: list[Record], **place: Any) -> Record:
    (found,) = [r for r in records if all(r.cell[k] == v for k, v in place.items())]
    return found


def test_every_cell_is_done_and_has_all_scores(records: list[Record]) -> None:
    assert [r.error for r in records] == [None] * 11
    for record in records:
        assert record.status == DONE
        assert {t: set(r.metrics) for t, r in record.tasks.items()} == {
            "t_choice": {"acc", "acc_norm"},
            "t_text": {"word_perplexity", "bits_per_byte"},
            "t_group": {"acc"},
        }
        assert [record.tasks[t].items for t in ("t_choice", "t_text", "t_group")] == [12, 5, 15]
        assert [record.tasks[t].chance for t in ("t_choice", "t_text", "t_group")] == [
            0.5, None, 0.5,
        ]  # fmt: skip


def test_items_make_the_score(records: list[Record]) -> None:
    for record in records:
        for task in record.tasks.values():
            for metric in task.metrics.values():
                assert metric.items is not None
                assert len(metric.items) == task.items
                again = score_of(metric.form, metric.items, metric.weights)
                assert math.isclose(again, metric.value, rel_tol=1e-6)


def test_conditions_are_those_of_the_base_model(records: list[Record]) -> None:
    assert len({json.dumps(r.conditions, sort_keys=True) for r in records}) == 1
    assert len({r.tasks["t_choice"].items_digest for r in records}) == 1
    digests = {(r.compression or {}).get("weights_digest") for r in records}
    assert len(digests) == 1 + 8 + 1  # dense, eight draws, and one for both runs of magnitude


def test_runs_of_a_data_free_method_give_the_same(records: list[Record]) -> None:
    first, second = (of(records, method="magnitude", draw=draw) for draw in (0, 1))
    assert first.key != second.key
    assert first.tasks == second.tasks


def test_a_cell_does_not_depend_on_those_before_it(
    cells: list[Cell], records: list[Record], tmp_path: Path
) -> None:
    some = [3, 0, 9, 3]
    bench = Bench(tmp_path)
    for n in some:
        assert lasting(bench.measure(cells[n])) == lasting(records[n])


def test_requests_are_built_once_and_asked_without_old_answers(
    cells: list[Cell], tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    first, second, again = (bench.measure(cell) for cell in (cells[0], cells[1], cells[0]))
    assert bench._tasks is not None
    shared = bench._tasks[1].requests
    assert shared.built == len(
        {leaf for leaves, _ in bench._tasks[1].parts.values() for leaf in leaves}
    )
    assert lasting(first) == lasting(again)
    assert first.tasks != second.tasks
    shared.serve("another model")
    bench.measure(cells[0])
    assert shared.built > len(bench._tasks[1].parts)


def test_scores_are_those_of_the_command_that_is_printed(
    cells: list[Cell], records: list[Record], tmp_path: Path
) -> None:
    """Also: cells of one process are those of fresh ones."""
    some = [0, 4]
    commands = []
    for n in some:
        _, *words = shlex.split(cells[n].command())
        commands.append([*words, "--output_path", str(tmp_path / str(n)), "--log_samples"])
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for n in some:
        (file,) = (tmp_path / str(n)).rglob("results_*.json")
        found = json.loads(file.read_text())
        for task, result in records[n].tasks.items():
            for name, metric in result.metrics.items():
                assert found["results"][task][f"{name},none"] == metric.value
        compression = found["config"].get("compression") or {}
        ours = records[n].compression or {}
        for name in ("weights_digest", "key", "calibration"):
            assert compression.get(name) == ours.get(name)
        (samples,) = (tmp_path / str(n)).rglob("samples_t_choice_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        values = [row["acc"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        assert values == records[n].tasks["t_choice"].metrics["acc"].items


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": ("t_choice", "no_such.yaml")}, "tasks: not found: no_such.yaml"),
        ({"pretrained": "/no/such/model"}, "/no/such/model"),
        ({"no_such_argument": 1}, "no_such_argument"),
    ],
)
def test_a_broken_cell_is_a_record_with_its_error(
    cells: list[Cell], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    if "tasks" not in change:
        change = {"loading": {**cells[4].loading, **change}}
    bench = Bench(tmp_path)
    record = bench.measure(replace(cells[4], **change))
    assert record.status == FAILED
    assert words in (record.error or "")
    assert "\n" not in (record.error or "")
    assert "Traceback" in (tmp_path / f"{record.key[:16]}.log").read_text()
    assert bench.measure(cells[4]).status == DONE


def test_scores_that_are_no_numbers_are_an_error(
    cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_calib_plugin.leaderboard import run

    plain = run.simple_evaluate

    def broken(**arguments: Any) -> Any:
        found = plain(**arguments)
        found["results"]["t_text"]["word_perplexity,none"] = math.inf
        return found

    monkeypatch.setattr(run, "simple_evaluate", broken)
    record = Bench(tmp_path).measure(cells[0])
    assert record.status == FAILED
    assert "t_text: word_perplexity,none is inf" in (record.error or "")
    record.to_text()


def test_a_group_without_a_score_is_an_error(cells: list[Cell], tmp_path: Path) -> None:
    folder = Path(str(cells[0].harness["include_path"]))
    (folder / "t_bare.yaml").write_text("group: t_bare\ntask: [t_one, t_two]\n")
    try:
        record = Bench(tmp_path).measure(replace(cells[0], tasks=("t_bare",)))
    finally:
        (folder / "t_bare.yaml").unlink()
    assert record.status == FAILED
    assert "t_bare has no score of its own" in (record.error or "")
    assert "name its tasks instead: t_one, t_two" in (record.error or "")
