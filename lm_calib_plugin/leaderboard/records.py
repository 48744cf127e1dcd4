"""What is kept of a measured cell: one signed JSON file, written whole or not at all.

Records of one grid may be made anywhere and brought together by copying their files: the name of a
record is the identity of its cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.storage import check_record, json_object, record_text, write_text

RECORD_VERSION = 1
FOLDER = "records"
DONE, FAILED = "done", "failed"
NAME_LENGTH = 16
# How per-item values make the score: their weighted mean, or its exponential.
MEAN, EXPONENTIAL = "mean", "exp"
# Ends of names of what a clock gave.
TIMES = ("seconds", "per_second")


@dataclass(frozen=True)
class Metric:
    """One metric of one task.

    ``items`` are the values of the items in the order of their numbers, and ``weights`` how much
    each counts (None: all the same); ``value`` is their weighted mean, or with ``form=exp`` the
    exponential of it (perplexities: items in nats a word, weights in words). Where the harness
    adds items up in yet another way, ``items`` is None.
    """

    value: float
    higher_is_better: bool
    form: str = MEAN
    items: list[float] | None = None
    weights: list[float] | None = None
    stderr: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """What came out of one task, or of a group of tasks, as it was asked for.

    ``hash`` and ``items_digest`` name what was asked of the model, prompts and targets; ``chance``
    is the score of guessing, where the task has choices.
    """

    version: str
    n_shot: int | None
    hash: str
    items_digest: str
    items: int
    chance: float | None
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class Record:
    """A measured cell, or the error that it ended with.

    ``key`` is that of the cell, ``cell`` its place in the grid with title and command,
    ``identity`` what it was asked to be. ``compression`` is the summary of what was done to the
    model (None: dense), without times; ``conditions`` what has to be equal for records to be
    compared. ``costs`` holds seconds, memory and machine: it is never part of a report.
    """

    key: str
    cell: dict[str, Any]
    identity: dict[str, Any]
    status: str
    error: str | None = None
    compression: dict[str, Any] | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)

    def to_text(self) -> str:
        """Return the content of the file."""
        return record_text({"record_version": RECORD_VERSION, **asdict(self)})

    @classmethod
    def from_file(cls, path: Path) -> Record:
        """Read a record.

        Raises
        ------
        UserError
            When the file is damaged, was changed, or is of another version.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _unusable(str(path), error) from None
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> Record:
        """Read the content of a file; ``place`` names it in the error of :meth:`from_file`."""
        try:
            content = check_record(json_object(data), data)
            version = content.pop("record_version", None)
            if version != RECORD_VERSION:
                raise ValueError(f"expected version {RECORD_VERSION}, found {version}")
            content["tasks"] = {
                name: TaskResult(
                    **{**task, "metrics": {m: Metric(**v) for m, v in task["metrics"].items()}}
                )
                for name, task in content["tasks"].items()
            }
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _unusable(place, error) from None


def without_times(value: Any) -> Any:
    """Return plain values without those that a clock gave: ``seconds``, ``tokens_per_second``."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.endswith(TIMES)}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def _unusable(place: str, error: Exception) -> UserError:
    return UserError(
        place,
        f"cannot be used ({error})",
        "a record as it was written",
        "delete it; its cell is then run again",
    )


class Records:
    """The records of one leaderboard, in a folder.

    Parameters
    ----------
    folder
        That of the leaderboard; records are in ``records`` below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def path(self, key: str) -> Path:
        """Return where the record of a cell is, or would be."""
        return self.folder / f"{key[:NAME_LENGTH]}.json"

    def has(self, key: str) -> bool:
        """Tell whether a cell has a record, done or failed."""
        return self.path(key).is_file()

    def read(self, key: str) -> Record | None:
        """Return the record of a cell, if there is one."""
        path = self.path(key)
        if not path.is_file():
            return None
        record = Record.from_file(path)
        if record.key != key:
            raise UserError(str(path), "holds another cell than its name says", fix="delete it")
        return record

    def read_all(self, keys: Iterable[str]) -> Iterator[Record]:
        """Yield the records of cells, of those that have one."""
        for key in keys:
            record = self.read(key)
            if record is not None:
                yield record

    def write(self, record: Record) -> Path:
        """Write a record; whoever reads sees the whole of it, or nothing."""
        path = self.path(record.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, record.to_text())
        return path
