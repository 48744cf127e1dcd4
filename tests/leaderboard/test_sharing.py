"""Cells that see the same inputs cost one pass over them, and their records are those of others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin.engine import walk
from lm_calib_plugin.leaderboard.cells import Cell, cells_of
from lm_calib_plugin.leaderboard.grid import check_grid
from lm_calib_plugin.leaderboard.records import DONE, Records
from lm_calib_plugin.leaderboard.run import Bench
from lm_calib_plugin.leaderboard.sharing import Expected, needs_of
from lm_calib_plugin.leaderboard.start import Where, run_grid
from tests.leaderboard.fakes import lasting, light_cells
from tests.leaderboard.tiny_grid import tiny_grid


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    """Two draws of five methods, three of which need other kinds of statistics, without repeats."""
    content = tiny_grid(tmp_path_factory.mktemp("board")) | {
        "methods": {
            "wanda": {"method": "wanda", "sparsity": 0.5},
            "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
            "gptq": {"method": "gptq", "bits": 4, "group_size": 8},
            "rtn": {"method": "rtn", "bits": 4, "group_size": 8},
            "heldout": {"method": "gptq_heldout", "bits": 3, "group_size": 8},
        },
        "levels": {"all": {}},
        "calibrations": {"ids": "random"},
        "tasks": ["t_choice"],
        "controls": False,
    }
    content["recipe"] = {"nsamples": 20, "seqlen": 16, "propagate": "dense"}
    return cells_of(check_grid(content))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every pass over a calibration set."""
    found: list[int] = []
    real = walk._Walk.capture

    def counted(self: Any) -> None:
        found.append(1)
        real(self)

    monkeypatch.setattr(walk._Walk, "capture", counted)
    return found


def test_one_pass_for_each_draw(cells: list[Cell], captures: list[int], tmp_path: Path) -> None:
    """Through the door of the command line, and with the records of cells measured alone."""
    outcome = run_grid(cells, tmp_path, Where(), quiet=True)
    assert outcome.code == 0
    with_data = [cell for cell in cells if needs_of(cell) is not None]
    assert len(with_data) == 8
    assert len({needs_of(cell)[0] for cell in with_data}) == 2  # type: ignore[index]
    assert len(captures) == 2
    records = Records(tmp_path)
    for cell in cells:
        record = records.read(cell.key)
        assert record.status == DONE
        assert lasting(Bench(tmp_path / "logs").measure(cell)) == lasting(record)


def test_without_cells_to_come_a_pass_watches_what_its_own_needs(
    cells: list[Cell], captures: list[int], tmp_path: Path
) -> None:
    first = [cell for cell in cells if cell.draw == 0 and cell.method in ("wanda", "sparsegpt")]
    bench = Bench(tmp_path)
    for cell in first:
        assert bench.measure(cell).status == DONE
    assert len(captures) == 2


def test_what_is_expected_are_the_kinds_of_cells_that_are_left(cells: list[Cell]) -> None:
    place = {(cell.method, cell.draw): cell for cell in cells}
    expected = Expected(cells)
    every = {"moments", "gram", "gram+heldout"}
    assert expected.kinds(place["wanda", 0]) == every
    expected.done(place["heldout", 0])
    assert expected.kinds(place["wanda", 0]) == {"moments", "gram"}
    assert expected.kinds(place["heldout", 1]) == every
    for name in ("sparsegpt", "gptq"):
        expected.done(place[name, 0])
    assert expected.kinds(place["wanda", 0]) == {"moments"}
    assert expected.kinds(cells[0]) == set()


@pytest.mark.parametrize(
    "change",
    [
        {"propagate": "compressed"},
        {"method": "magnitude", "calibration": "none", "nsamples": None, "seqlen": None},
        {"sparsity": 2},
        {"method": "awq", "sparsity": None, "bits": 4, "group_size": 8},
    ],
)
def test_cells_that_share_nothing_expect_nothing(cells: list[Cell], change: dict[str, Any]) -> None:
    (cell, *_) = [cell for cell in cells if cell.method == "wanda"]
    assert needs_of(cell) is not None
    if "calibration" in change:
        change |= dict.fromkeys(["calib_seed", "propagate"])
    fields = {k: v for k, v in {**(cell.recipe or {}), **change}.items() if v is not None}
    assert needs_of(replace(cell, recipe=fields)) is None
    assert needs_of(replace(cell, repeat=1)) is None


@pytest.mark.parametrize("change", [{"calib_seed": 7}, {"heldout": 0.5}, {"seqlen": 8}])
def test_other_inputs_have_another_name(cells: list[Cell], change: dict[str, Any]) -> None:
    (cell, *_) = [cell for cell in cells if cell.method == "wanda"]
    other = needs_of(replace(cell, recipe={**(cell.recipe or {}), **change}))
    mine = needs_of(cell)
    assert other is not None
    assert mine is not None
    assert other[0] != mine[0]


def test_cells_are_looked_at_without_a_model() -> None:
    Expected(light_cells())
