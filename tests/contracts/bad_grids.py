"""What users get wrong in a grid file, and in commands that run one; see ``bad_inputs.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_calib_plugin.leaderboard.cells import cells_of
from lm_calib_plugin.leaderboard.grid import check_grid, read_grid
from lm_calib_plugin.leaderboard.local import shard_of
from lm_calib_plugin.leaderboard.ray_engine import resources_of
from lm_calib_plugin.leaderboard.start import Where
from lm_calib_plugin.leaderboard.verify import chosen
from lm_calib_plugin.leaderboard.workers import jobs_of
from tests.contracts.bad_inputs import Case

GOOD: dict[str, Any] = {
    "models": {"m": {"pretrained": "org/model"}},
    "methods": ["wanda"],
    "levels": ["50%"],
    "calibrations": {"c4": "c4", "own": "self"},
    "tasks": ["piqa", "lambada_openai"],
}


def grid(**changes: Any) -> Callable[[], Any]:
    """A good grid but for these keys; None leaves a key out."""
    content = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
    return lambda: cells_of(check_grid(content))


def grid_file(text: str, *changes: str) -> Callable[[], Any]:
    """A grid file of this content in the current folder."""

    def do() -> Any:
        Path("grid.yaml").write_text(text)
        return read_grid("grid.yaml", changes)

    return do


def case(label: str, argument: str, *must: str, **changes: Any) -> Case:
    return Case(f"grid_{label}", grid(**changes), argument, must)


TEXT = "models: [m]\nmethods: [wanda]\nlevels: [50%]\ncalibrations: [self]\ntasks: [piqa]\n"
GRIDS = [
    # --- the file
    Case("grid_file_missing", lambda: read_grid("no.yaml"), "grid", ("no file 'no.yaml'",)),
    Case("grid_file_empty", grid_file(""), "grid", ("no `name: value` lines", "methods: [wanda]")),
    Case("grid_file_broken", grid_file("models: [m\nlevels: 1"), "grid", ("grid.yaml, line 2",)),
    Case("grid_file_twice", grid_file(TEXT + "tasks: [x]\n"), "grid", ("line 6", "tasks")),
    Case(
        "grid_file_says_where",
        grid_file(TEXT + "draws: none\n"),
        "draws",
        ("grid.yaml, line 6", "whole number"),
    ),
    Case("grid_set_no_value", grid_file(TEXT, "draws"), "set", ("PATH=VALUE", "--set draws=2")),
    Case("grid_set_no_yaml", grid_file(TEXT, "draws=[1"), "set", ("a value in YAML",)),
    Case("grid_set_into_a_list", grid_file(TEXT, "tasks.x=1"), "set", ("a path of names",)),
    # --- keys
    case("unknown_key", "method", "did you mean `methods`?", "keys: name, ", method="wanda"),
    case("without_models", "models", "missing", "models, methods, levels and tasks", models=None),
    case("without_methods", "methods", "missing", methods=None),
    case("without_levels", "levels", "missing", levels=[]),
    case("without_tasks", "tasks", "missing", tasks=None),
    case("without_calibrations", "calibrations", "missing", "[c4, self]", calibrations=None),
    case("name_list", "name", "got ['a']", "a text", name=["a"]),
    case("description_list", "description", "a text", description=["a"]),
    # --- axes
    case("models_number", "models", "got 3", "`name: value` lines", models=3),
    case("model_without_path", "models.m", "no pretrained", models={"m": {"dtype": "float32"}}),
    case("model_none", "models.m", "got None", models={"m": None}),
    case("method_unknown", "method", "did you mean `wanda`?", methods=["wnada"]),
    case("method_none", "methods.m", "got {'method': None}", methods={"m": {"method": None}}),
    case("level_unknown", "levels", "got 'half'", "50%, 2:4, W3", levels=["half"]),
    case("level_too_many_bits", "wanda W3", "bits", "exclude: [{level: W3", levels=["50%", "W3"]),
    case("calibration_none", "calibrations.c4", "got None", calibrations={"c4": None}),
    case("calibration_unknown", "wanda 50% c5", "c5", "exclude:", calibrations=["c5"]),
    case("recipe_list", "recipe", "got [1]", "`name: value` lines", recipe=[1]),
    case(
        "model_token",
        "models.m.token",
        "records",
        "HF_TOKEN",
        models={"m": {"pretrained": "org/m", "token": "hf_secret"}},
    ),
    case("recipe_unknown_field", "wanda 50%", "nsamples", "exclude:", recipe={"nsample": 8}),
    case("draws_zero", "draws", ">= 1", draws=0),
    case("draws_fraction", "draws", "whole number", draws=1.5),
    case("draws_none", "draws", "got []", "different seeds", draws=[]),
    case("draws_twice", "draws", "got [1, 1]", "different seeds", draws=[1, 1]),
    case("draws_negative", "draws", ">= 0", draws=[-1]),
    case("tasks_number", "tasks", "got 3", "task names or YAML files", tasks=3),
    case("tasks_twice", "tasks", "every task once", tasks=["piqa", "piqa"]),
    # --- tasks
    case("metric_of_no_task", "metrics.x", "no task of this grid", "piqa", metrics={"x": "acc"}),
    case("chance_of_no_task", "chance.x", "no task of this grid", chance={"x": 0.5}),
    case("chance_one", "chance.piqa", "got 1", "0 <= c < 1", chance={"piqa": 1}),
    case("chance_text", "chance.piqa", "got 'half'", chance={"piqa": "half"}),
    case("metrics_list", "metrics", "`name: value` lines", metrics=["acc"]),
    case("harness_unknown", "harness.limits", "did you mean `limit`?", harness={"limits": 3}),
    case("harness_list", "harness", "`name: value` lines", harness=["limit"]),
    # --- what is compared, added and left out
    case("baseline_unknown", "baseline", "got 'owm'", "did you mean `own`?", baseline="owm"),
    case("baseline_list", "baseline", "got \"['c4']\"", baseline=["c4"]),
    case("controls_unknown", "controls.nul", "did you mean `null`?", controls={"nul": False}),
    case("controls_text", "controls", "got 'off'", controls="off"),
    case("exclude_mapping", "exclude", "a list", exclude={"model": "m"}),
    case("exclude_axis", "exclude[0].levl", "did you mean `level`?", exclude=[{"levl": "50%"}]),
    case("exclude_name", "exclude[0].level", "allowed: 50%", exclude=[{"level": "60%"}]),
    case("exclude_draw", "exclude[0].draw", "got '4'", "allowed: 0", exclude=[{"draw": 4}]),
    case("exclude_everything", "exclude[0]", "selects every cell", exclude=[{}]),
    case("exclude_a_model", "exclude", "nothing is left of model m", exclude=[{"model": "m"}]),
    case("override_shape", "overrides[0]", "{where: ", overrides=[{"level": "50%"}]),
    case(
        "override_name",
        "overrides[0].where.method",
        "got 'gptq'",
        "allowed: wanda",
        overrides=[{"where": {"method": "gptq"}, "set": {"nsamples": 4}}],
    ),
    case(
        "override_field",
        "wanda 50%",
        "nsamples",
        overrides=[{"where": {"method": "wanda"}, "set": {"nsample": 4}}],
    ),
    case("two_cells_alike", "grid", "two cells are the same", levels={"a": "50%", "b": 0.5}),
    # --- where cells run
    Case("shard_zero", lambda: shard_of([], "0/4"), "shard", ("1 <= i <= n", "--shard 1/4")),
    Case("shard_too_far", lambda: shard_of([], "5/4"), "shard", ("got '5/4'",)),
    Case("shard_text", lambda: shard_of([], "first"), "shard", ("got 'first'",)),
    Case("jobs_zero", lambda: jobs_of("0", []), "jobs", (">= 1",)),
    Case("jobs_text", lambda: jobs_of("all", []), "jobs", ("got 'all'",)),
    Case(
        "jobs_beside_ray",
        lambda: Where(jobs="2", engine="ray").check(),
        "jobs",
        ("--ray-resources CPU=2",),
    ),
    Case(
        "ray_address_without_ray",
        lambda: Where(ray_address="auto").check(),
        "ray-address",
        ("--engine ray",),
    ),
    Case(
        "ray_resources_text",
        lambda: resources_of("CPU=2,GPU"),
        "ray-resources",
        ("got 'GPU'", "CPU=2,GPU=1"),
    ),
    Case("ray_resources_negative", lambda: resources_of("CPU=-1"), "ray-resources", ("CPU=-1",)),
    Case(
        "verify_nothing_done",
        lambda: chosen([], Path("leaderboards/none")),
        "verify",
        ("no cell is done", "lm-calib leaderboard run"),
    ),
]
