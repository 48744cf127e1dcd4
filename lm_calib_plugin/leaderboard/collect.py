"""Brings the records of a grid together, and refuses those that can not be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.records import DONE, FAILED, Record, Records
from lm_calib_plugin.leaderboard.tables import DENSE

# What may not differ between records of one table, and what that is called.
EVERYWHERE = {"lm_eval": "version of lm_eval"}
PER_MODEL = {
    "model": "weights of the base model",
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
}
PER_TASK = {
    "version": "version of the task",
    "n_shot": "number of shots",
    "hash": "hash of prompts and targets",
    "items_digest": "items",
}


@dataclass
class Arm:
    """All draws of one model, level, method and calibration: one row of a table."""

    model: str
    level: str
    method: str
    calibration: str
    role: str
    cells: dict[int, Cell] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """A name that no other row has."""
        if self.role == DENSE:
            return f"{self.model} dense"
        return f"{self.model} {self.level} {self.method} {self.calibration}"

    @property
    def missing(self) -> tuple[int, ...]:
        """Draws that were not run."""
        return tuple(d for d in self.cells if d not in self.records and d not in self.failed)


@dataclass
class Collected:
    """Rows in the order of the grid, and pairs of records that should be the same."""

    arms: list[Arm]
    repeats: list[tuple[Cell, Record | None, Record | None]]


def collect(cells: Sequence[Cell], records: Records) -> Collected:
    """Read the records of cells and sort them into rows.

    Raises
    ------
    UserError
        When a record is damaged, or two were not made under the same conditions; both are named.
    """
    arms: dict[tuple[str, ...], Arm] = {}
    repeated: list[tuple[Cell, Record | None]] = []
    found: list[Record] = []
    for cell in cells:
        record = records.read(cell.key)
        if record is not None and record.status == DONE:
            found.append(record)
        if cell.repeat:
            repeated.append((cell, record))
            continue
        place = (cell.model, cell.level, cell.method, cell.calibration)
        arm = arms.setdefault(place, Arm(*place, cell.role))
        arm.cells[cell.draw] = cell
        if record is not None and record.status == FAILED:
            arm.failed[cell.draw] = record.error or "failed"
        elif record is not None:
            arm.records[cell.draw] = record
    check_comparable(found)
    repeats = []
    for cell, record in repeated:
        arm = arms[cell.model, cell.level, cell.method, cell.calibration]
        repeats.append((cell, arm.records.get(cell.draw), record))
    return Collected(list(arms.values()), repeats)


def check_comparable(records: Iterable[Record]) -> None:
    """Refuse records that were not made under the same conditions.

    Raises
    ------
    UserError
        It names what differs, both values and both cells.
    """
    seen: dict[tuple[str, ...], tuple[Any, Record]] = {}

    def same(record: Record, place: tuple[str, ...], value: Any, what: str) -> None:
        before, other = seen.setdefault(place, (value, record))
        if before != value:
            raise UserError(
                "records",
                f"{what}: {_short(before)} in {_name(other)}, {_short(value)} in {_name(record)}",
                "records of one leaderboard are made under the same conditions",
                "delete the records of one of both and run the grid again",
            )

    for record in records:
        model = record.cell["model"]
        for name, what in EVERYWHERE.items():
            same(record, (name,), record.conditions.get(name), what)
        for name, what in PER_MODEL.items():
            same(record, (name, model), record.conditions.get(name), f"{what} {model}")
        for task, result in record.tasks.items():
            for name, what in PER_TASK.items():
                value = getattr(result, name)
                same(record, (name, model, task), value, f"{what}, task {task}")
        _check_set(record, same)


def _check_set(record: Record, same: Callable[..., None]) -> None:
    """One calibration and one draw of it are one set, whoever uses it."""
    own = (record.compression or {}).get("calibration")
    recipe = record.identity.get("recipe")
    if not own or not recipe:
        return
    from lm_calib_plugin.recipe import Recipe
    from lm_calib_plugin.storage import digest

    asked = {name: recipe.get(name) for name in Recipe.calibration_fields()}
    place = ("set", record.cell["model"], digest(asked))
    what = f"tokens of {record.cell['calibration']}, draw {record.cell['draw']}"
    same(record, place, own["calib_id"], what)


def _name(record: Record) -> str:
    return f"{record.key[:12]} ({record.cell['title']})"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:16]}..."
