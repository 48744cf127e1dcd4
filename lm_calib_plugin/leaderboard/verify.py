"""``lm-calib leaderboard verify``: run done cells again, and compare what comes out bit by bit."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.records import DONE, NAME_LENGTH, Record, Records, without_times
from lm_calib_plugin.storage import cache_dir

# Parts of a record that two measurements of a cell have to agree on; `costs` is none.
COMPARED = ("key", "status", "error", "identity", "compression", "conditions", "tasks")
SHOWN = 12


@dataclass(frozen=True)
class Check:
    """A cell that was run again: what differs, and what differs between the two machines."""

    cell: Cell
    differences: tuple[str, ...]
    circumstances: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Yield the outcome for people."""
        name = self.cell.key[:NAME_LENGTH]
        if not self.differences:
            yield f"same {name} {self.cell.title}: every value, bit by bit"
            return
        yield f"differs {name} {self.cell.title}"
        yield from (f"  {one}" for one in self.differences[:SHOWN])
        if len(self.differences) > SHOWN:
            yield f"  and {len(self.differences) - SHOWN} more"
        told = listed(self.circumstances) if self.circumstances else "nothing that is recorded"
        yield f"  what else differs: {told}"


def chosen(
    cells: Sequence[Cell], folder: Path, *, name: str | None = None, seed: int = 0, count: int = 1
) -> list[Cell]:
    """Return done cells to run again: the one named, or some by chance.

    Parameters
    ----------
    cells
        All cells.
    folder
        That of the leaderboard.
    name
        Beginning of a key, or part of a title.
    seed
        Of the choice; the global random state is not used.
    count
        How many are chosen.

    Raises
    ------
    UserError
        When there is no such cell, or more than one.
    """
    records = Records(folder)
    done = [c for c in cells if (r := records.read(c.key)) is not None and r.status == DONE]
    if not done:
        raise UserError("verify", f"no cell is done in {folder}", "", "lm-calib leaderboard run")
    if name is None:
        places = np.random.default_rng(seed).permutation(len(done))[:count]
        return [done[place] for place in sorted(places)]
    found = [c for c in done if c.key.startswith(name)] or [c for c in done if name in c.title]
    if len(found) != 1:
        some = [f"{c.key[:NAME_LENGTH]} ({c.title})" for c in (found or done)[:3]]
        raise UserError(
            "cell",
            f"{name!r} is {f'{len(found)} done cells' if found else 'no done cell'}",
            "the beginning of a key, or a part of a title",
            f"for instance {listed(some)}",
        )
    return found


def verify(
    cells: Sequence[Cell], folder: Path, measure: Callable[[Cell], Record]
) -> Iterator[Check]:
    """Measure cells again and compare them with their records; no record is written."""
    records = Records(folder)
    for cell in cells:
        before = records.read(cell.key)
        assert before is not None
        # As it would come out of its file.
        again = Record.from_bytes(measure(cell).to_text().encode(), cell.title)
        yield Check(cell, tuple(differences(before, again)), tuple(circumstances(before, again)))


@contextlib.contextmanager
def afresh() -> Iterator[Path]:
    """Hide what earlier runs left in our cache, but models; yields a folder for logs."""
    name, models = "LM_CALIB_CACHE", cache_dir() / "models"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "cache"
        own.mkdir()
        if models.is_dir():
            (own / "models").symlink_to(models.resolve(), target_is_directory=True)
        os.environ[name] = str(own)
        try:
            yield Path(folder) / "logs"
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def differences(before: Record, again: Record) -> Iterator[str]:
    """Yield what two records of a cell do not agree on, but for what they cost."""
    one, two = asdict(before), asdict(again)
    for record in (one, two):
        # Versions are circumstances: they alone make no other result.
        record["compression"] = _without(without_times(record["compression"]), "versions")
    for part in COMPARED:
        yield from _compared(part, one[part], two[part])


def circumstances(before: Record, again: Record) -> Iterator[str]:
    """Yield what differs in versions and machines of two records: ``torch 2.1 then, 2.2 now``."""
    for part in ("versions", "machine"):
        then, now = before.costs.get(part) or {}, again.costs.get(part) or {}
        for name in sorted({*then, *now}):
            if then.get(name) != now.get(name):
                yield f"{name} {then.get(name, 'none')} then, {now.get(name, 'none')} now"


def _without(values: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    return None if values is None else {k: v for k, v in values.items() if k != name}


def _compared(name: str, then: Any, now: Any) -> Iterator[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted({*then, *now}):
            yield from _compared(f"{name}.{key}", then.get(key), now.get(key))
    elif _numbers(then) and _numbers(now) and len(then) == len(now):
        gaps = [abs(a - b) for a, b in zip(then, now, strict=True) if a != b]
        if gaps:
            yield f"{name}: {len(gaps)} of {len(then)} values, by up to {max(gaps):.3g}"
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, (one, two) in enumerate(zip(then, now, strict=True)):
            yield from _compared(f"{name}[{number}]", one, two)
    elif then != now:
        gap = f", by {abs(then - now):.3g}" if _numbers([then, now]) else ""
        yield f"{name}: {_brief(then)} then, {_brief(now)} now{gap}"


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
    )


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
