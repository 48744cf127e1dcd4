"""The grids that come with the project, and what the guide says of grids."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lm_calib_plugin.leaderboard.cells import cells_of
from lm_calib_plugin.leaderboard.grid import KEYS, check_grid, read_grid
from lm_calib_plugin.leaderboard.grid_keys import CONTROLS, HARNESS
from lm_calib_plugin.leaderboard.tables import DATA_FREE, DENSE, NULL

ROOT = Path(__file__).parents[2]
GRIDS = sorted((ROOT / "examples" / "leaderboards").glob("*.yaml"))
GUIDE = (ROOT / "docs" / "leaderboards.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_grids_are_whole(path: Path) -> None:
    grid = read_grid(path)
    cells = cells_of(grid)
    assert grid.name == path.stem.replace("_", "-")
    roles = {cell.role for cell in cells}
    assert {DENSE, DATA_FREE, NULL} <= roles
    assert any(cell.repeat for cell in cells)
    assert grid.baseline in grid.calibrations
    assert len(grid.draws) > 1


def test_there_is_a_small_one_for_each_large_one() -> None:
    names = {path.stem for path in GRIDS}
    assert names - {"demo"} == {
        f"{name}{size}" for name in ("l1", "l2", "l3", "l5") for size in ("", "_small")
    }


def test_l1_has_as_many_cells_as_its_axes_say() -> None:
    # Eight calibrations, twenty draws, seven levels; OWL only where fractions are divided.
    with_data = 8 * 20 * (3 * 7 + 5)
    assert len(cells_of(read_grid(ROOT / "examples/leaderboards/l1.yaml"))) == with_data + 2 * 7 + 2


def test_small_grids_need_no_account() -> None:
    for path in GRIDS:
        if path.stem.endswith("_small"):
            for model in read_grid(path).models.values():
                assert model["pretrained"] == "builtin:smollm2-135m"


def test_the_guide_names_every_key() -> None:
    for name in (*KEYS, *HARNESS, *CONTROLS):
        if name not in ("name", "description"):
            assert f"`{name}" in GUIDE or f"`{name}`" in GUIDE, name


def test_the_grid_of_the_guide_is_one() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.S)
    grid = check_grid(yaml.safe_load(block))
    assert len(cells_of(grid)) == 1 + 4 * 5 * 2 * 2 + 2 * 2 + 1


def test_the_guide_names_every_grid() -> None:
    for path in GRIDS:
        assert f"examples/leaderboards/{path.name})" in GUIDE


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_commands_in_comments_are_understood(path: Path) -> None:
    comments = [c[1:] for c in path.read_text(encoding="utf-8").splitlines() if c.startswith("#")]
    text = "\n".join(comments).replace("\\\n", " ")
    lines = re.findall(r"lm-calib leaderboard \w+ .*", text)
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[3] == f"examples/leaderboards/{path.name}"
        changes = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
        assert cells_of(read_grid(path, changes))
