"""Brings the records of a grid together, and refuses those that can not be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.expression import parse_calibration
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.records import FAILED, Record, Records
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.storage import digest

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
    """All draws of one model, level, method and calibration: one row of a table.

    ``same`` are draws that turned out to be a set that counts already.
    """

    model: str
    level: str
    method: str
    calibration: str
    role: str
    cells: dict[int, Cell] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    same: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        """A name that no other row has."""
        return next(iter(self.cells.values())).row

    @property
    def missing(self) -> tuple[int, ...]:
        """Draws that were not run."""
        known = {*self.records, *self.failed, *self.same}
        return tuple(draw for draw in self.cells if draw not in known)

    def drop_same(self) -> None:
        """Leave out draws of one and the same calibration set: no other text was looked at."""
        seen: set[str] = set()
        for draw in sorted(self.records):
            data = (self.records[draw].compression or {}).get("calibration") or {}
            if data.get("calib_id") in seen:
                self.same = (*self.same, draw)
                del self.records[draw]
            seen.add(data.get("calib_id", draw))


@dataclass
class Collected:
    """Rows in the order of the grid, and pairs of records that should be the same.

    ``failures`` are titles and errors of all cells that failed, repeats among them.
    """

    arms: list[Arm]
    repeats: list[tuple[Cell, Record | None, Record | None]]
    failures: list[tuple[str, str]]


def collect(cells: Sequence[Cell], records: Records) -> Collected:
    """Read the records of cells and sort them into rows.

    Raises
    ------
    UserError
        When a record is damaged, or two were not made under the same conditions; both are named.
    """
    arms: dict[str, Arm] = {}
    done: dict[str, Record] = {}
    failures: list[tuple[str, str]] = []
    for cell in cells:
        record = records.read(cell.key)
        if record is not None and record.status == FAILED:
            failures.append((cell.title, record.error or "failed"))
        elif record is not None:
            done[cell.key] = record
        if cell.repeat:
            continue
        place = (cell.model, cell.level, cell.method, cell.calibration)
        arm = arms.setdefault(cell.row, Arm(*place, cell.role))
        arm.cells[cell.draw] = cell
        if cell.key in done:
            arm.records[cell.draw] = done[cell.key]
        elif record is not None:
            arm.failed[cell.draw] = record.error or "failed"
    check_comparable(done.values())
    repeats = [
        (cell, arms[cell.row].records.get(cell.draw), done.get(cell.key))
        for cell in cells
        if cell.repeat
    ]
    for arm in arms.values():
        arm.drop_same()
    return Collected(list(arms.values()), repeats, failures)


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
    asked = {name: recipe.get(name) for name in Recipe.calibration_fields()}
    if any(
        term.name in registry.table("mixture") for term in parse_calibration(asked["calibration"])
    ):
        # Its shares are found for a method and a level.
        asked = recipe
    place = ("set", record.cell["model"], digest(asked))
    what = f"tokens of {record.cell['calibration']}, draw {record.cell['draw']}"
    same(record, place, own["calib_id"], what)


def _name(record: Record) -> str:
    return f"{record.key[:12]} ({record.cell['title']})"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:16]}..."
