"""The cells of a grid: one model, compressed in one way and evaluated, each with its command."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.expression import NO_DATA
from lm_calib_plugin.leaderboard.grid import Grid, is_null
from lm_calib_plugin.leaderboard.tables import COMPRESSED, DATA_FREE, DENSE, NULL
from lm_calib_plugin.recipe import Recipe, read_arguments
from lm_calib_plugin.runtime import RUNTIME_ARGUMENTS
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
    def row(self) -> str:
        """The name of the row of a table that the cell is a draw of."""
        if self.role == DENSE:
            return f"{self.model} dense"
        return f"{self.model} {self.level} {self.method} {self.calibration}"

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
        isinstance(value, (int, float)) or (isinstance(value, str) and _stays_text(value))
        for value in arguments.values()
    )
    if simple:
        return ",".join(f"{name}={value}" for name, value in arguments.items())
    return json.dumps(dict(arguments))


def _stays_text(value: str) -> bool:
    """Tell whether the harness reads a text back as the same text: no list, no number."""
    if not value or set(value) & set(",{}[]'\"") or value.lower() in ("true", "false", "none"):
        return False
    with contextlib.suppress(ValueError):
        float(value)
        return False
    return True


def as_word(value: Any) -> str:
    """Return a value as one word of a command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def cells_of(grid: Grid) -> list[Cell]:
    """Return all cells of a grid, the dense model and controls among them.

    They are in the order they are run in: what shares a model, then a calibration set, is together,
    and so are the runs of a control.

    Raises
    ------
    UserError
        When method, level and calibration of a cell do not go together; what to exclude is named.
    """
    for fields in grid.methods.values():
        registry.find_method(str(fields["method"]))
    found: list[Cell] = []
    for model in grid.models:
        compressed = list(_compressed(grid, model))
        if not compressed:
            raise UserError("exclude", f"nothing is left of model {model}", "at least one cell")
        found.append(_cell(grid, _Place(model), DENSE))
        found += compressed
    rows: dict[str, Cell] = {}
    for cell in found:
        first = rows.setdefault(cell.row, cell)
        if {**first.names, "draw": 0} != {**cell.names, "draw": 0}:
            raise UserError(
                "grid", f"two rows are called `{cell.row}`", "names that tell apart", "rename one"
            )
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


@dataclass(frozen=True)
class _Place:
    """Where a cell stands in its grid; None where an axis is left open."""

    model: str
    level: str = ""
    method: str = DENSE
    calibration: str | None = ""
    draw: int | None = 0

    def is_in(self, where: Mapping[str, Any]) -> bool:
        """Tell whether a selection holds, whatever is left open."""
        return all(
            getattr(self, axis) is not None and str(getattr(self, axis)) in names
            for axis, names in where.items()
        )


def _compressed(grid: Grid, model: str) -> Iterable[Cell]:
    pairs = [
        _Place(model, level, method, None, None) for method in grid.methods for level in grid.levels
    ]
    pairs = [pair for pair in pairs if not _excluded(grid, pair)]
    free = [pair for pair in pairs if not _needs_data(grid, pair)]
    with_data = [pair for pair in pairs if pair not in free]
    if with_data and not grid.calibrations:
        raise UserError(
            "calibrations",
            "missing",
            "sources for methods that use data",
            "for instance [c4, self]",
        )
    again = grid.controls.repeat
    # A run that is stopped has whole draws.
    for draw in grid.draws:
        for calibration in grid.calibrations:
            role = NULL if is_null(grid, calibration) else COMPRESSED
            for pair in with_data:
                place = replace(pair, calibration=calibration, draw=draw)
                if _excluded(grid, place):
                    continue
                cell = _cell(grid, place, role)
                yield cell
                if again and role == COMPRESSED:
                    yield replace(cell, repeat=1)
                    again = False
    for pair in free:
        yield from _twice(grid, pair)
    if grid.controls.data_free:
        have = {pair.level for pair in free}
        for level in dict.fromkeys(pair.level for pair in with_data if pair.level not in have):
            yield from _control(grid, model, level)


def _excluded(grid: Grid, place: _Place) -> bool:
    return any(place.is_in(where) for where in grid.exclude)


def _twice(grid: Grid, pair: _Place) -> Iterable[Cell]:
    """Yield the runs of a method without data."""
    for draw in DATA_FREE_RUNS:
        yield replace(_cell(grid, replace(pair, calibration=NO_DATA), DATA_FREE), draw=draw)


def _control(grid: Grid, model: str, level: str) -> Iterable[Cell]:
    """Yield the runs of the data-free control of a level, if one goes with it.

    What the level asks for may need data itself; the report notes where there is no control.
    """
    named, fields = grid.controls.data_free, grid.levels[level]
    name = named if isinstance(named, str) else _data_free_method(fields)
    rows = [*registry.table("pruning").values(), *registry.table("quantization").values()]
    every = {option for row in rows for option in row.options}
    try:
        options = Recipe(**{"method": name, **fields, "calibration": NO_DATA}).options
        # Of what all cells share, options of the other methods are not its own.
        shared = {k: v for k, v in grid.recipe.items() if k not in every or k in options}
        own = replace(grid, methods={name: {"method": name}}, recipe=shared, overrides=())
        yield from _twice(own, _Place(model, level, name, None, None))
    except UserError:
        if isinstance(named, str):
            raise


def _data_free_method(level: Mapping[str, Any]) -> str:
    removes = bool({"sparsity", "pattern"} & set(level))
    rounds = bool({"bits", "scheme"} & set(level))
    if removes and rounds:
        return "magnitude+rtn"
    return "magnitude" if removes else "rtn"


def _cell(grid: Grid, place: _Place, role: str) -> Cell:
    recipe = None if role == DENSE else _checked(_fields(grid, place, role == DATA_FREE), place)
    return Cell(
        place.model,
        place.level,
        place.method,
        place.calibration or "",
        place.draw or 0,
        role,
        dict(grid.models[place.model]),
        recipe,
        grid.tasks,
        grid.harness,
    )


def _fields(grid: Grid, place: _Place, data_free: bool) -> dict[str, Any]:
    """Return the fields of a recipe, as they were typed: later ones win."""
    shared = dict(grid.recipe)
    data: dict[str, Any] = {"calibration": NO_DATA}
    if data_free:
        for name in Recipe.calibration_fields():
            shared.pop(name, None)
    else:
        data = {**grid.calibrations[str(place.calibration)], "calib_seed": place.draw}
    found = {**shared, **grid.methods[place.method], **grid.levels[place.level], **data}
    for override in grid.overrides:
        if place.is_in(override.where):
            found |= override.set
    return found


def _checked(recipe: dict[str, Any], place: _Place) -> dict[str, Any]:
    """Return recipe fields that make a recipe, as they were typed."""
    try:
        read_arguments(recipe)
    except UserError as error:
        axes = {"level": place.level, "method": place.method, "calibration": place.calibration}
        where = ", ".join(
            f"{axis}: {name}" for axis, name in axes.items() if name not in (None, NO_DATA)
        )
        raise UserError(
            " ".join(str(name) for name in (place.method, place.level, place.calibration) if name),
            str(error),
            fix=f"or leave it out: exclude: [{{{where}}}]",
        ) from None
    own = [name for name in recipe if name in RUNTIME_ARGUMENTS]
    if own:
        raise UserError(own[0], "no field of a recipe: it changes no result", fix="drop it")
    return recipe


def _needs_data(grid: Grid, pair: _Place) -> bool:
    """Tell whether a method uses data at a level, by all that the grid says of both."""
    fields = {**_fields(grid, pair, data_free=True), "calibration": "self"}
    return Recipe(**_checked(fields, pair)).needs_data
