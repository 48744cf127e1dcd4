"""Cells of a grid: which there are, in which order, under which name."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard.cells import Cell, as_text, cells_of
from lm_calib_plugin.leaderboard.grid import check_grid
from lm_calib_plugin.recipe import Recipe

GRID: dict[str, Any] = {
    "models": {"a": "org/a", "b": {"pretrained": "org/b", "dtype": "float16"}},
    "methods": ["wanda", "sparsegpt"],
    "levels": ["50%", "2:4"],
    "calibrations": ["c4", "self"],
    "draws": [0, 7],
    "tasks": ["piqa"],
    "harness": {"limit": 10, "batch_size": 8, "apply_chat_template": True},
    "controls": False,
}


def cells(**changes: Any) -> list[Cell]:
    return cells_of(check_grid({**GRID, **changes}))


def places(found: list[Cell]) -> list[tuple[Any, ...]]:
    return [(c.model, c.level, c.method, c.calibration, c.draw) for c in found]


def test_cells_are_the_product_and_a_dense_model() -> None:
    axes = product("ab", ["50%", "2:4"], ["wanda", "sparsegpt"], ["c4", "self"], [0, 7])
    found = [c for c in cells() if c.role != "dense"]
    assert sorted(places(found)) == sorted(axes)
    dense = [c for c in cells() if c.role == "dense"]
    assert [(c.model, c.recipe, c.model_class) for c in dense] == [
        ("a", None, "hf"),
        ("b", None, "hf"),
    ]


def test_what_is_shared_is_together_and_whole_draws_come_first() -> None:
    found = cells()
    assert [c.model for c in found] == ["a"] * 17 + ["b"] * 17
    own = [(c.draw, c.calibration) for c in found[1:17]]
    assert own == sorted(own, key=lambda pair: (pair[0], ["c4", "self"].index(pair[1])))


def test_controls_are_added() -> None:
    found = cells(controls=True, models=["org/a"])
    roles = [c.role for c in found]
    assert roles.count("dense") == 1
    assert roles.count("null") == 2 * 2 * 2
    free = [c for c in found if c.role == "data-free"]
    assert {(c.method, c.calibration) for c in free} == {("magnitude", "none")}
    assert [(c.draw, c.level) for c in free] == [(0, "50%"), (1, "50%"), (0, "2:4"), (1, "2:4")]
    (again,) = [c for c in found if c.repeat]
    (first,) = [c for c in found if places([c]) == places([again]) and not c.repeat]
    assert (again.recipe, again.key != first.key) == (first.recipe, True)
    bits = cells(controls=True, methods=["gptq"], levels=["W3"])
    assert {c.method for c in bits if c.role == "data-free"} == {"rtn"}
    own = cells(controls=True, methods=["wanda", "magnitude"])
    assert {c.method for c in own if c.role == "data-free"} == {"magnitude"}


def test_exclusions_and_overrides() -> None:
    left = cells(exclude=[{"model": "a", "level": "2:4"}, {"draw": 7, "method": "wanda"}])
    expected = [
        place
        for place in places(cells())
        if not (place[0] == "a" and place[1] == "2:4")
        and not (place[4] == 7 and place[2] == "wanda")
    ]
    assert places(left) == expected
    changed = cells(overrides=[{"where": {"method": "wanda", "draw": 7}, "set": {"nsamples": 4}}])
    for cell in changed:
        wanted = 4 if cell.method == "wanda" and cell.draw == 7 else None
        assert (cell.recipe or {}).get("nsamples") == wanted


def test_the_key_is_what_may_change_the_scores() -> None:
    cell = cells()[5]
    same = [
        replace(cell, model="other name", level="x", method="y", calibration="z"),
        replace(cell, harness={**cell.harness, "batch_size": 1, "device": "cpu"}),
        replace(cell, harness={**cell.harness, "include_path": "elsewhere"}),
    ]
    assert {c.key for c in same} == {cell.key}
    other = [
        replace(cell, loading={**cell.loading, "dtype": "float32"}),
        replace(cell, recipe={**(cell.recipe or {}), "nsamples": 3}),
        replace(cell, tasks=("arc_easy",)),
        replace(cell, harness={**cell.harness, "limit": 11}),
        replace(cell, draw=5),
        replace(cell, repeat=1),
    ]
    assert len({c.key for c in other} | {cell.key}) == 7
    everything = [c.key for c in cells(controls=True)]
    assert len(set(everything)) == len(everything)


def test_commands_say_everything() -> None:
    cell = next(c for c in cells() if c.model == "b" and c.method == "sparsegpt" and c.draw == 7)
    words = shlex.split(cell.command())
    assert words[:3] == ["lm_eval", "--model", "calib_pruned"]
    assert words[words.index("--limit") + 1] == "10"
    assert "--apply_chat_template" in words
    text = words[words.index("--model_args") + 1]
    given = dict(pair.split("=", 1) for pair in text.split(","))
    loading = {"pretrained": "org/b", "dtype": "float16"}
    assert {k: given.pop(k) for k in loading} == loading
    assert Recipe.from_model_args(given) == Recipe(**(cell.recipe or {}))
    quantized = cells(methods=["gptq"], levels=["W3"])[1]
    assert quantized.model_class == "calib_quantized"


@pytest.mark.parametrize("value", ["a,b", '{"a": 1}', ["x"], {"k": 2}, None])
def test_arguments_that_are_no_plain_text_are_json(value: Any) -> None:
    given = {"pretrained": "m", "x": value}
    assert json.loads(as_text(given)) == given
    assert as_text({"pretrained": "m", "x": 0.5}) == "pretrained=m,x=0.5"


def test_every_level_gets_the_control_that_goes_with_it() -> None:
    levels = {"half": {"sparsity": 0.5}, "W3": {"bits": 3}, "both": {"sparsity": 0.5, "bits": 4}}
    out = [
        {"method": "wanda", "level": ["W3", "both"]},
        {"method": "gptq", "level": ["half", "both"]},
        {"method": "sparsegpt+gptq", "level": ["half", "W3"]},
    ]
    found = cells(
        controls=True,
        levels=levels,
        methods=["wanda", "gptq", "sparsegpt+gptq"],
        # Of the methods with data alone.
        recipe={"damp": 0.05, "propagate": "dense"},
        overrides=[{"where": {"method": "wanda"}, "set": {"damp": None}}],
        exclude=out,
    )
    free = {c.level: c.method for c in found if c.role == "data-free"}
    assert free == {"half": "magnitude", "W3": "rtn", "both": "magnitude+rtn"}


def test_overrides_of_a_draw_leave_runs_without_data_alone() -> None:
    found = cells(
        controls=True,
        draws=2,
        exclude=[{"draw": 1, "method": "wanda"}],
        overrides=[{"where": {"draw": 0}, "set": {"ignore": "lm_head"}}],
    )
    free = [c for c in found if c.role == "data-free" and c.model == found[0].model]
    assert [c.draw for c in free] == [0, 1] * len({c.level for c in free})
    assert all("ignore" not in (c.recipe or {}) for c in free)


def test_rows_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two rows are called"):
        cells(
            methods={"wanda": {}, "wanda new": {"method": "ria"}},
            calibrations={"c4": "c4", "new c4": "self"},
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"levels": {"a": {"sparsity": 0.5, "method": "sparsegpt"}}},
        {"recipe": {"calibration": "c4"}},
        {"recipe": {"calib_seed": 1}},
        {"overrides": [{"where": {"method": "wanda"}, "set": {"calib_seed": 1}}]},
        {"recipe": {"calib_batch_size": 4}},
        {"harness": {"seed": [1, 2, 3]}},
    ],
)
def test_what_would_make_a_name_untrue_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        cells(**changes)


def test_texts_that_look_like_numbers_stay_texts() -> None:
    assert as_text({"revision": "12e4567"}) == '{"revision": "12e4567"}'
    assert as_text({"revision": "main", "limit": 3}) == "revision=main,limit=3"
