"""Grid files: what may be typed, and what it means. What may not: ``tests/contracts``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard.grid import (
    Controls,
    Override,
    check_grid,
    is_null,
    read_grid,
)

GOOD: dict[str, Any] = {
    "models": ["org/model"],
    "methods": ["wanda"],
    "levels": ["50%"],
    "calibrations": ["c4", "self"],
    "tasks": ["piqa"],
}


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ("50%", {"sparsity": 0.5}),
        ("62.5 %", {"sparsity": 0.625}),
        (0.3, {"sparsity": 0.3}),
        ("2:4", {"pattern": "2:4"}),
        ("W3", {"bits": 3}),
        ("w4", {"bits": 4}),
        (3, {"bits": 3}),
        ("W8A8", {"scheme": "W8A8"}),
    ],
)
def test_levels_are_read(given: Any, fields: dict[str, Any]) -> None:
    assert check_grid({**GOOD, "levels": [given]}).levels == {str(given): fields}
    assert check_grid({**GOOD, "levels": given}).levels == {str(given): fields}
    named = check_grid({**GOOD, "levels": {"mine": given, "own": {"bits": 2, "group_size": 16}}})
    assert named.levels == {"mine": fields, "own": {"bits": 2, "group_size": 16}}


def test_axes_are_lists_or_names_with_fields() -> None:
    grid = check_grid(
        {
            **GOOD,
            "models": {"m": {"pretrained": "org/model", "dtype": "float32"}, "n": "org/other"},
            "methods": {"wanda": {}, "mine": {"method": "sparsegpt", "damp": 0.1}, "gptq": "gptq"},
            "calibrations": {"text": "file:a.txt", "long": {"calibration": "c4", "seqlen": 512}},
        }
    )
    assert grid.models == {
        "m": {"pretrained": "org/model", "dtype": "float32"},
        "n": {"pretrained": "org/other"},
    }
    assert grid.methods == {
        "wanda": {"method": "wanda"},
        "mine": {"method": "sparsegpt", "damp": 0.1},
        "gptq": {"method": "gptq"},
    }
    assert grid.calibrations["text"] == {"calibration": "file:a.txt"}
    assert grid.calibrations["long"] == {"calibration": "c4", "seqlen": 512}


def test_a_null_control_is_added_once() -> None:
    assert list(check_grid(GOOD).calibrations) == ["c4", "self", "null:random"]
    with_own = {**GOOD, "calibrations": ["c4", "null:ascii"]}
    assert list(check_grid(with_own).calibrations) == ["c4", "null:ascii"]
    other = {**GOOD, "controls": {"null": "null:ellipsis"}}
    assert list(check_grid(other).calibrations) == ["c4", "self", "null:ellipsis"]
    for off in (False, {"null": False}, {"null": None}):
        assert list(check_grid({**GOOD, "controls": off}).calibrations) == ["c4", "self"]
    grid = check_grid(with_own)
    assert [is_null(grid, name) for name in ("c4", "null:ascii", "none")] == [False, True, False]


def test_controls_are_on_unless_turned_off() -> None:
    assert check_grid(GOOD).controls == Controls(True, True, "null:random")
    assert check_grid({**GOOD, "controls": False}).controls == Controls(False, False, None)
    some = {"data_free": "magnitude", "repeat": False}
    found = check_grid({**GOOD, "controls": some}).controls
    assert found == Controls("magnitude", False, "null:random")


def test_draws_are_a_number_or_seeds() -> None:
    assert check_grid(GOOD).draws == (0,)
    assert check_grid({**GOOD, "draws": 3}).draws == (0, 1, 2)
    assert check_grid({**GOOD, "draws": [5, 2]}).draws == (5, 2)


def test_tasks_are_a_list_or_a_text() -> None:
    assert check_grid({**GOOD, "tasks": "piqa, own.yaml"}).tasks == ("piqa", "own.yaml")
    assert check_grid({**GOOD, "harness": {"limit": 3, "seed": None}}).harness == {"limit": 3}


def test_selections_hold_for_all_axes_they_name() -> None:
    grid = check_grid(
        {
            **GOOD,
            "draws": 2,
            "exclude": [{"calibration": ["c4", "self"], "draw": 1}],
            "overrides": [{"where": {"method": "wanda"}, "set": {"nsamples": 4}}],
        }
    )
    assert grid.exclude == ({"calibration": ("c4", "self"), "draw": ("1",)},)
    assert grid.overrides == (Override({"method": ("wanda",)}, {"nsamples": 4}),)


def test_files_are_read_and_changed(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "models: [org/model]\nmethods: [wanda]\nlevels: [50%]\ncalibrations: {a: c4}\n"
        "tasks: [piqa]\n"
    )
    assert read_grid(path).name == "mine"
    changes = ["draws=2", "calibrations.b=file:b.txt", "recipe.nsamples=8", "name=other"]
    grid = read_grid(path, changes)
    assert (grid.name, grid.draws, grid.recipe) == ("other", (0, 1), {"nsamples": 8})
    assert list(grid.calibrations) == ["a", "b", "null:random"]
    with pytest.raises(UserError) as caught:
        read_grid(path, ["draws=0"])
    assert "mine.yaml" not in str(caught.value)  # it stands on the command line
