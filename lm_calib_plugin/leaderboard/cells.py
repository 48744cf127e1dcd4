"""The cells of a grid: one model, compressed in one way and evaluated, each with its command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.expression import NO_DATA
from lm_calib_plugin.leaderboard.grid import Grid, is_null, selects
from lm_calib_plugin.leaderboard.tables import COMPRESSED, DATA_FREE, DENSE, NULL
from lm_calib_plugin.recipe import Recipe, read_arguments
from lm_calib_plugin.storage import digest

# What changes no score; where tasks are found does not, and records hold hashes of what they ask.
WITHOUT_EFFECT = (
    "batch_size", "max_batch_size", "device", "include_path", "confirm_run_unsafe_code",
)  # fmt: skip
# A data-free method is run twice: what differs then is noise of the implementation.
DATA_FREE_RUNS = (0, 1)
BUILTIN = "builtin:"
UNCHANGED = {"method": "magnitude", "sparsity": 0, "calibration": NO_DATA}
# Flags of the harness that have to be turned off.
ON_BY_DEFAULT = ("fewshot_as_multiturn",)
CLASSES = {"pruning": "calib_pruned", "quantization": "calib_quantized"}


@dataclass(frozen=True)
class Cell:
    """One evaluation.

    ``model``, ``level``, ``method`` and ``calibration`` are names of the grid; ``recipe`` is None
    for the dense model. ``repeat`` is 1 for the second run of a cell that should give the same.
    """

    model: str
    level: str
    method: str
    calibration: str
    draw: int
    role: str
    loading: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    tasks: tuple[str, ...]
    harness: Mapping[str, Any] = field(default_factory=dict)
    repeat: int = 0

    @property
    def names(self) -> dict[str, Any]:
        """The place of the cell in the grid, by axis."""
        return {
            "model": self.model,
            "level": self.level,
            "method": self.method,
            "calibration": self.calibration,
            "draw": self.draw,
        }

    @property
    def title(self) -> str:
        """The cell in words, on one line."""
        if self.role == DENSE:
            return f"{self.model}, dense"
        again = ", again" if self.repeat else ""
        return (
            f"{self.model}, {self.method} {self.level}, {self.calibration}, draw {self.draw}{again}"
        )

    @property
    def model_class(self) -> str:
        """What ``lm_eval --model`` gets."""
        if self.recipe is None:
            return "hf"
        return CLASSES.get(Recipe(**self.recipe).entry.kind, "calib")

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``lm_eval --model_args`` gets."""
        return {**self.loading, **(self.recipe or {})}

    def identity(self) -> dict[str, Any]:
        """Return everything that may change the scores, as plain values."""
        recipe = None if self.recipe is None else Recipe(**self.recipe).to_metadata()
        settings = {k: v for k, v in self.harness.items() if k not in WITHOUT_EFFECT}
        return {
            "loading": {k: v for k, v in sorted(self.loading.items()) if k not in WITHOUT_EFFECT},
            "recipe": recipe,
            "tasks": list(self.tasks),
            "harness": settings,
            # Of a data-free method the draw is nothing but another run.
            "run": [self.draw, self.repeat],
        }

    @property
    def key(self) -> str:
        """The name of the cell: the sha256 of its identity."""
        return digest(self.identity())

    def command(self) -> str:
        """Return the line that measures the cell by itself, to be pasted into a shell."""
        kind, arguments = self.model_class, self.arguments
        if self.recipe is None and str(arguments["pretrained"]).startswith(BUILTIN):
            # The harness' own class knows no builtin model; nothing removed changes no bit.
            kind, arguments = "calib_pruned", {**arguments, **UNCHANGED}
        words = ["lm_eval", "--model", kind, "--model_args", as_text(arguments)]
        words += ["--tasks", ",".join(self.tasks)]
        for name, value in self.harness.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not False or name in ON_BY_DEFAULT:
                words += [f"--{name}", as_word(value)]
        return shlex.join(words)


def as_text(arguments: Mapping[str, Any]) -> str:
    """Return arguments as ``--model_args`` takes them: ``key=value,...``, or JSON where needed."""
    simple = all(
        isinstance(value, (str, int, float, bool)) and not set(str(value)) & set(",{}[]'\"")
        for value in arguments.values()
    )
    if simple:
        return ",".join(f"{name}={value}" for name, value in arguments.items())
    return json.dumps(dict(arguments))


def as_word(value: Any) -> str:
    """Return a value as one word of a command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def cells_of(grid: Grid) -> list[Cell]:
    """Return all cells of a grid, the dense model and controls among them.

    They are in the order they are run in: what shares a model, then a calibration set, is together.

    Raises
    ------
    UserError
        When method, level and calibration of a cell do not go together; what to exclude is named.
    """
    found: list[Cell] = []
    for model in grid.models:
        compressed = list(_compressed(grid, model))
        if not compressed:
            raise UserError("exclude", f"nothing is left of model {model}", "at least one cell")
        found.append(_cell(grid, model, "", DENSE, "", 0, DENSE))
        found += compressed
        found += _repeated(grid, compressed)
    unique = {cell.key: cell for cell in reversed(found)}
    if len(unique) < len(found):
        twice = next(c for c in reversed(found) if unique[c.key] is not c)
        raise UserError(
            "grid",
            f"two cells are the same: {twice.title}; {unique[twice.key].title}",
            "every cell once",
            "drop one of their names",
        )
    return found


def _compressed(grid: Grid, model: str) -> Iterable[Cell]:
    free = {name: fields for name, fields in grid.methods.items() if not _needs_data(grid, fields)}
    with_data = [name for name in grid.methods if name not in free]
    if with_data and not grid.calibrations:
        raise UserError(
            "calibrations",
            "missing",
            "sources for methods that use data",
            "for instance [c4, self]",
        )
    # A run that is stopped has whole draws.
    for draw in grid.draws:
        for calibration in grid.calibrations:
            role = NULL if is_null(grid, calibration) else COMPRESSED
            for method in with_data:
                for level in grid.levels:
                    yield from _kept(grid, model, level, method, calibration, draw, role)
    for draw in DATA_FREE_RUNS:
        for method in free:
            for level in grid.levels:
                yield from _kept(grid, model, level, method, NO_DATA, draw, DATA_FREE)
        if not free and grid.controls.data_free:
            yield from _data_free(grid, model, draw)


def _data_free(grid: Grid, model: str, draw: int) -> Iterable[Cell]:
    """Yield the data-free control of every level that it goes with and that is in use."""
    named = grid.controls.data_free
    for level, fields in grid.levels.items():
        if not any(
            next(iter(_kept(grid, model, level, method, calibration, grid.draws[0], "")), None)
            for method in grid.methods
            for calibration in grid.calibrations
        ):
            continue
        name = named if isinstance(named, str) else _data_free_method(fields)
        own = replace(grid, methods={name: {"method": name}})
        try:
            yield from _kept(own, model, level, name, NO_DATA, draw, DATA_FREE)
        except UserError:
            # What the level asks for may need data itself; the report notes that.
            if isinstance(named, str):
                raise


def _data_free_method(level: Mapping[str, Any]) -> str:
    return "magnitude" if {"sparsity", "pattern"} & set(level) else "rtn"


def _kept(
    grid: Grid, model: str, level: str, method: str, calibration: str, draw: int, role: str
) -> Iterable[Cell]:
    """Yield a cell, unless the grid leaves it out."""
    place = {
        "model": model, "level": level, "method": method, "calibration": calibration, "draw": draw,
    }  # fmt: skip
    if not any(selects(where, place) for where in grid.exclude):
        yield _cell(grid, model, level, method, calibration, draw, role)


def _cell(
    grid: Grid, model: str, level: str, method: str, calibration: str, draw: int, role: str
) -> Cell:
    loading = dict(grid.models[model])
    recipe: dict[str, Any] | None = None
    place = {
        "model": model, "level": level, "method": method, "calibration": calibration, "draw": draw,
    }  # fmt: skip
    changes = [o.set for o in grid.overrides if role != DENSE and selects(o.where, place)]
    if role != DENSE:
        data = {"calibration": NO_DATA} if role == DATA_FREE else grid.calibrations[calibration]
        seed = {} if role == DATA_FREE else {"calib_seed": draw}
        recipe = {**grid.methods[method], **grid.levels[level], **data, **seed}
        shared = grid.recipe
        if role == DATA_FREE:
            shared = {k: v for k, v in shared.items() if k not in Recipe.calibration_fields()}
        recipe = {**shared, **recipe}
        for change in changes:
            recipe |= change
        recipe = _checked(recipe, place)
    return Cell(
        model, level, method, calibration, draw, role, loading, recipe, grid.tasks, grid.harness
    )


def _checked(recipe: dict[str, Any], place: Mapping[str, Any]) -> dict[str, Any]:
    """Return recipe fields that make a recipe, as they were typed."""
    try:
        read_arguments(recipe)
    except UserError as error:
        where = ", ".join(f"{axis}: {place[axis]}" for axis in ("level", "method", "calibration"))
        raise UserError(
            f"{place['method']} {place['level']} {place['calibration']}",
            str(error),
            fix=f"or leave it out: exclude: [{{{where}}}]",
        ) from None
    return recipe


def _needs_data(grid: Grid, fields: Mapping[str, Any]) -> bool:
    """Tell whether a method uses data; levels do not change that."""
    problem: UserError | None = None
    for level in grid.levels.values():
        try:
            return Recipe(**{**fields, **level, "calibration": "self"}).needs_data
        except UserError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _repeated(grid: Grid, cells: Iterable[Cell]) -> list[Cell]:
    """Return the first cell that uses data once more."""
    with_data = [cell for cell in cells if cell.role == COMPRESSED]
    return [replace(with_data[0], repeat=1)] if grid.controls.repeat and with_data else []
