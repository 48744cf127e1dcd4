"""The grid file: base models x methods x levels x calibrations x draws, and tasks, as typed.

Nothing heavy is imported here: a grid is checked, and its cells are listed, before any library that
could load a model is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.recipe_file import read_value, read_yaml
from lm_calib_plugin.values import whole

GRID = "grid"
AXES = ("model", "level", "method", "calibration", "draw")
KEYS = (
    "name", "description", "models", "methods", "levels", "calibrations", "recipe", "draws",
    "tasks", "metrics", "chance", "harness", "baseline", "controls", "exclude", "overrides",
)  # fmt: skip
# Arguments of the harness that may stand in a grid, and those of them that change no score.
HARNESS = (
    "num_fewshot", "limit", "batch_size", "max_batch_size", "device", "include_path",
    "apply_chat_template", "fewshot_as_multiturn", "system_instruction", "gen_kwargs", "seed",
    "confirm_run_unsafe_code",
)  # fmt: skip
SECRET = ("token", "proxies")
SEEDS = 4  # of random, numpy, torch and the choice of shots
CONTROLS = ("data_free", "repeat", "null")
DEFAULT_NULL = "null:random"
_PERCENT = re.compile(r"^(\d+(?:\.\d+)?) ?%$")
_PATTERN = re.compile(r"^\d+:\d+$")
_BITS = re.compile(r"^[wW](\d+)$")


@dataclass(frozen=True)
class Controls:
    """What is added by itself; ``data_free`` and ``null`` may name something, or be off (None).

    ``data_free=True`` takes ``magnitude`` or ``rtn``, as the levels need.
    """

    data_free: str | bool = True
    repeat: bool = True
    null: str | None = DEFAULT_NULL


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
    calibrations = _named("calibrations", content.get("calibrations"), "calibration")
    controls = _controls(content.get("controls", True))
    if controls.null and calibrations and not any(map(_is_null, calibrations.values())):
        calibrations = {**calibrations, controls.null: {"calibration": controls.null}}
    grid = Grid(
        name=_text("name", content.get("name", name)),
        description=_text("description", content.get("description", "")),
        models=_named("models", content["models"], "pretrained"),
        methods=_named("methods", content["methods"], "method"),
        levels=_levels(content["levels"]),
        calibrations=calibrations,
        recipe=_mapping("recipe", content.get("recipe") or {}),
        draws=_draws(content.get("draws", 1)),
        tasks=_tasks(content["tasks"]),
        metrics=_mapping("metrics", content.get("metrics") or {}),
        chance=_chance(content.get("chance") or {}),
        harness=_harness(content.get("harness") or {}),
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
        _selection(grid, f"exclude[{n}]", one) for n, one in enumerate(_list("exclude", content))
    )
    overrides = []
    for n, one in enumerate(_list("overrides", content)):
        place = f"overrides[{n}]"
        if not isinstance(one, Mapping) or set(one) != {"where", "set"}:
            raise UserError(place, f"got {one!r}", "{where: {axis: name}, set: {field: value}}")
        where = _selection(grid, f"{place}.where", one["where"])
        overrides.append(Override(where, _mapping(f"{place}.set", one["set"])))
    _check_axes(grid, overrides)
    return replace(grid, exclude=exclude, overrides=tuple(overrides))


def _selection(grid: Grid, place: str, given: Any) -> dict[str, tuple[str, ...]]:
    found = {}
    for axis, names in _mapping(place, given).items():
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


def _named(place: str, given: Any, main: str) -> dict[str, dict[str, Any]]:
    """Return name -> fields of an axis: a list of texts, or a mapping to texts or fields."""
    if given is None:
        return {}
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list):
        given = {str(one): one for one in given}
    found = {}
    for name, one in _mapping(place, given).items():
        fields = dict(one) if isinstance(one, Mapping) else {main: one}
        if main == "method":
            fields.setdefault(main, name)
        if not all(isinstance(key, str) for key in fields) or fields.get(main, "") is None:
            raise UserError(
                f"{place}.{name}", f"got {one!r}", f"a text, or fields and `{main}: NAME`"
            )
        found[str(name)] = fields
    return found


def _levels(given: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(given, (list, Mapping)):
        given = [given]
    if isinstance(given, list):
        return {str(one): _level(one) for one in given}
    return {
        str(name): dict(one) if isinstance(one, Mapping) else _level(one)
        for name, one in given.items()
    }


def _level(given: Any) -> dict[str, Any]:
    """Return the recipe fields of ``50%``, ``0.5``, ``2:4``, ``W3``, ``3`` or a scheme."""
    from lm_calib_plugin.schemes import SCHEMES

    text = str(given).strip()
    if match := _PERCENT.match(text):
        return {"sparsity": float(match[1]) / 100}
    if _PATTERN.match(text):
        return {"pattern": text}
    if match := _BITS.match(text):
        return {"bits": int(match[1])}
    if text in SCHEMES:
        return {"scheme": text}
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return {"sparsity": given} if 0 <= given < 1 else {"bits": given}
    raise UserError(
        "levels",
        f"got {given!r}",
        "50%, 2:4, W3, a scheme, or NAME: {field: value}",
        "for instance levels: [50%, 2:4]",
    )


def _controls(given: Any) -> Controls:
    if given is True:
        return Controls()
    if given in (False, None):
        return Controls(False, False, None)
    found = _mapping("controls", given)
    for name in found:
        if name not in CONTROLS:
            raise UserError(
                f"controls.{name}", "unknown", nearest(name, CONTROLS), listed(CONTROLS)
            )
    null = found.get("null", True)
    return Controls(
        found.get("data_free", True) or False,
        bool(found.get("repeat", True)),
        DEFAULT_NULL if null is True else null or None,
    )


def _is_null(fields: Mapping[str, Any]) -> bool:
    text = str(fields.get("calibration", ""))
    return text.startswith(("null:", "random"))


def is_null(grid: Grid, calibration: str) -> bool:
    """Tell whether a calibration of a grid is a control without meaning."""
    return calibration in grid.calibrations and _is_null(grid.calibrations[calibration])


def _draws(given: Any) -> tuple[int, ...]:
    if isinstance(given, list):
        seeds = tuple(whole("draws", seed, lowest=0) for seed in given)
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError("draws", f"got {given!r}", "different seeds, at least one")
        return seeds
    return tuple(range(whole("draws", given, lowest=1)))


def _tasks(given: Any) -> tuple[str, ...]:
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        raise UserError("tasks", f"got {given!r}", "a list of task names or YAML files")
    found = tuple(name.strip() for name in names)
    if len(set(found)) < len(found):
        raise UserError("tasks", f"got {listed(found)}", "every task once")
    return found


def _chance(given: Any) -> dict[str, float]:
    found = {}
    for task, value in _mapping("chance", given).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise UserError(f"chance.{task}", f"got {value!r}", "a score of guessing, 0 <= c < 1")
        found[task] = float(value)
    return found


def _harness(given: Any) -> dict[str, Any]:
    found = _mapping("harness", given)
    for name in found:
        if name not in HARNESS:
            raise UserError(f"harness.{name}", "unknown", nearest(name, HARNESS), listed(HARNESS))
    seeds = found.get("seed")
    if isinstance(seeds, list) and len(seeds) != SEEDS:
        raise UserError("harness.seed", f"got {seeds}", f"one number, or {SEEDS} of them")
    return {name: value for name, value in found.items() if value is not None}


def _mapping(place: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not all(isinstance(k, (str, int, float)) for k in given):
        raise UserError(place, f"got {given!r}", "`name: value` lines")
    return {str(name): value for name, value in given.items()}


def _list(key: str, content: Mapping[str, Any]) -> list[Any]:
    given = content.get(key) or []
    if not isinstance(given, list):
        raise UserError(key, f"got {given!r}", "a list")
    return given


def _text(key: str, given: Any) -> str:
    if not isinstance(given, (str, int, float)):
        raise UserError(key, f"got {given!r}", "a text")
    return str(given)


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
