"""The grid file: base models x methods x levels x calibrations x draws, and tasks, as typed.

Nothing heavy is imported here: a grid is checked, and its cells are listed, before any library that
could load a model is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.leaderboard import grid_keys as keys
from lm_calib_plugin.leaderboard.grid_keys import Controls
from lm_calib_plugin.recipe_file import read_value, read_yaml

GRID = "grid"
AXES = ("model", "level", "method", "calibration", "draw")
KEYS = (
    "name", "description", "models", "methods", "levels", "calibrations", "recipe", "draws",
    "tasks", "metrics", "chance", "harness", "baseline", "controls", "exclude", "overrides",
)  # fmt: skip
SECRET = ("token", "proxies")


@dataclass(frozen=True)
class Override:
    """Arguments that some cells get: ``where`` maps axes to the names it holds for."""

    where: Mapping[str, tuple[str, ...]]
    set: Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """A checked grid file.

    Parameters
    ----------
    models, methods, levels, calibrations
        Name -> arguments: of the model loader, and fields of a recipe.
    recipe
        Fields of a recipe that all cells share.
    draws
        Seeds; one draw of every calibration for each.
    tasks, metrics, chance
        Tasks of the harness; of tasks by name, the metric that counts and the score of guessing.
    harness
        Further arguments of ``lm_eval``.
    baseline
        Name of the calibration that others are compared with.
    controls
        What is added by itself.
    exclude
        Cells that are left out.
    overrides
        Arguments of some cells.
    """

    name: str
    models: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    levels: Mapping[str, Mapping[str, Any]]
    calibrations: Mapping[str, Mapping[str, Any]]
    tasks: tuple[str, ...]
    draws: tuple[int, ...] = (0,)
    description: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)
    harness: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    controls: Controls = field(default_factory=Controls)
    exclude: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    overrides: tuple[Override, ...] = ()


def read_grid(path: str | Path, changes: Sequence[str] = ()) -> Grid:
    """Read and check a grid file.

    Parameters
    ----------
    path
        A YAML file.
    changes
        ``PATH=VALUE`` texts that replace what stands there, such as ``draws=2`` or
        ``calibrations.c4=file:c4.jsonl``.

    Raises
    ------
    UserError
        For anything that is not understood, with the place in the grid.
    """
    content, places = read_yaml(path, GRID, "`methods: [wanda]`", "see examples/leaderboards")
    for change in changes:
        _change(content, change)
    try:
        return check_grid(content, name=Path(path).stem)
    except UserError as error:
        top = error.argument.partition(".")[0].partition("[")[0]
        if top in places and not any(c.startswith(top) for c in changes):
            raise error.at(places[top]) from None
        raise


def check_grid(content: Mapping[str, Any], name: str = "leaderboard") -> Grid:
    """Return the grid that a mapping describes; see :func:`read_grid`."""
    for key in content:
        if key not in KEYS:
            raise UserError(key, "no key of a grid", nearest(key, KEYS), f"keys: {listed(KEYS)}")
    for key in ("models", "methods", "levels", "tasks"):
        if not content.get(key):
            raise UserError(key, "missing", "a grid needs models, methods, levels and tasks")
    calibrations = keys.named("calibrations", content.get("calibrations"), "calibration")
    controls = keys.controls(content.get("controls", True))
    if controls.null and calibrations and not any(map(_is_null, calibrations.values())):
        calibrations = {**calibrations, controls.null: {"calibration": controls.null}}
    grid = Grid(
        name=keys.text("name", content.get("name", name)),
        description=keys.text("description", content.get("description", "")),
        models=keys.named("models", content["models"], "pretrained"),
        methods=keys.named("methods", content["methods"], "method"),
        levels=keys.levels(content["levels"]),
        calibrations=calibrations,
        recipe=keys.mapping("recipe", content.get("recipe") or {}),
        draws=keys.draws(content.get("draws", 1)),
        tasks=keys.tasks(content["tasks"]),
        metrics=keys.mapping("metrics", content.get("metrics") or {}),
        chance=keys.chance(content.get("chance") or {}),
        harness=keys.harness(content.get("harness") or {}),
        baseline=None if (base := content.get("baseline")) is None else str(base),
        controls=controls,
    )
    _check_axes(grid)
    for model, arguments in grid.models.items():
        if not arguments.get("pretrained"):
            raise UserError(f"models.{model}", "has no pretrained", "a hub name or a folder")
        for name in SECRET:
            if arguments.get(name):
                raise UserError(
                    f"models.{model}.{name}",
                    "would stand in records, reports and commands",
                    "log in with `hf auth login`, or set HF_TOKEN",
                    "drop it",
                )
    if grid.baseline is not None and grid.baseline not in grid.calibrations:
        names = grid.calibrations
        raise UserError(
            "baseline", f"got {grid.baseline!r}", nearest(grid.baseline, names), listed(names)
        )
    for what in ("metrics", "chance"):
        for task in getattr(grid, what):
            if task not in grid.tasks:
                raise UserError(f"{what}.{task}", "no task of this grid", listed(grid.tasks))
    return _with_selections(grid, content)


def _check_axes(grid: Grid, overrides: Sequence[Override] = ()) -> None:
    """Refuse a field on an axis that is not its own: names of rows would not be true."""
    places: dict[str, Mapping[str, Any]] = {"recipe": grid.recipe}
    for axis in ("methods", "levels", "calibrations"):
        places |= {f"{axis}.{name}": fields for name, fields in getattr(grid, axis).items()}
    places |= {f"overrides[{n}].set": override.set for n, override in enumerate(overrides)}
    for place, fields in places.items():
        for name, home in (
            ("method", "methods"),
            ("calibration", "calibrations"),
            ("calib_seed", "draws"),
        ):
            if name in fields and not place.startswith(home):
                raise UserError(f"{place}.{name}", f"has its place in `{home}`", fix="move it")


def _with_selections(grid: Grid, content: Mapping[str, Any]) -> Grid:
    exclude = tuple(
        _selection(grid, f"exclude[{n}]", one)
        for n, one in enumerate(keys.listing("exclude", content))
    )
    overrides = []
    for n, one in enumerate(keys.listing("overrides", content)):
        place = f"overrides[{n}]"
        if not isinstance(one, Mapping) or set(one) != {"where", "set"}:
            raise UserError(place, f"got {one!r}", "{where: {axis: name}, set: {field: value}}")
        where = _selection(grid, f"{place}.where", one["where"])
        overrides.append(Override(where, keys.mapping(f"{place}.set", one["set"])))
    _check_axes(grid, overrides)
    return replace(grid, exclude=exclude, overrides=tuple(overrides))


def _selection(grid: Grid, place: str, given: Any) -> dict[str, tuple[str, ...]]:
    found = {}
    for axis, names in keys.mapping(place, given).items():
        if axis not in AXES:
            raise UserError(f"{place}.{axis}", "no axis", nearest(axis, AXES), listed(AXES))
        wanted = tuple(str(n) for n in (names if isinstance(names, list) else [names]))
        known = [str(d) for d in grid.draws] if axis == "draw" else list(getattr(grid, f"{axis}s"))
        for name in wanted:
            if name not in known:
                raise UserError(
                    f"{place}.{axis}",
                    f"got {name!r}",
                    nearest(name, known),
                    f"allowed: {listed(known)}",
                )
        found[axis] = wanted
    if not found:
        raise UserError(place, "selects every cell", "at least one axis", listed(AXES))
    return found


def _is_null(fields: Mapping[str, Any]) -> bool:
    text = str(fields.get("calibration", ""))
    return text.startswith(("null:", "random"))


def is_null(grid: Grid, calibration: str) -> bool:
    """Tell whether a calibration of a grid is a control without meaning."""
    return calibration in grid.calibrations and _is_null(grid.calibrations[calibration])


def _change(content: dict[str, Any], change: str) -> None:
    """Replace one value of a grid, ``a.b=VALUE``; the value is read as YAML."""
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise UserError("set", f"got {change!r}", "PATH=VALUE", "for instance --set draws=2")
    *parents, last = path.split(".")
    at: Any = content
    for parent in parents:
        at = at.setdefault(parent, {}) if isinstance(at, dict) else None
    if not isinstance(at, dict):
        raise UserError("set", f"got {change!r}", "a path of names into the grid file")
    try:
        at[last] = read_value(text)
    except ValueError:
        raise UserError("set", f"got {change!r}", "a value in YAML after the =") from None
