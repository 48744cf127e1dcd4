"""``lm-calib leaderboard status``: what is done, failed, running and open; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.claims import Claims
from lm_calib_plugin.leaderboard.progress import duration, estimate, seconds_of
from lm_calib_plugin.leaderboard.records import DONE, FAILED, NAME_LENGTH, Records
from lm_calib_plugin.leaderboard.tables import DENSE

STATES = ("done", "failed", "running", "open")


def status_lines(cells: Sequence[Cell], folder: Path) -> Iterator[str]:
    """Yield a table over model and method, cells that run or failed, and what it costs."""
    records, claims = Records(folder), Claims(folder)
    found = {record.key: record for record in records.read_all(cell.key for cell in cells)}
    state = {}
    for cell in cells:
        record = found.get(cell.key)
        held = record is None and claims.is_held(cell.key)
        state[cell.key] = record.status if record else "running" if held else "open"
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model, cell.method or DENSE), []).append(cell)
    width = max(len(f"{model}, {method}") for model, method in groups)
    yield f"{'':<{width}}" + "".join(f"  {name:>7}" for name in (*STATES, "s/cell"))
    for (model, method), own in groups.items():
        counts = [sum(state[cell.key] == name for cell in own) for name in STATES]
        times = [seconds_of(found[c.key]) for c in own if state[c.key] == DONE]
        mean = f"{sum(times) / len(times):.1f}" if times else "-"
        row = "".join(f"  {n:>7}" for n in (*counts, mean))
        yield f"{f'{model}, {method}':<{width}}{row}"
    for cell in cells:
        name = cell.key[:NAME_LENGTH]
        begun = claims.begun(cell.key)
        if state[cell.key] == FAILED:
            yield f"failed {name} {cell.title}: {found[cell.key].error}"
        elif state[cell.key] == "running":
            yield f"running {name} {cell.title}"
        elif state[cell.key] == "open" and begun:
            times_ = "once" if begun == 1 else f"{begun} times"
            yield f"open {name} {cell.title}: begun {times_}, no process is at work on it"
    spent = sum(seconds_of(record) for record in found.values())
    spent += sum(r.costs.get("seconds", {}).get("failed", 0.0) for r in found.values())
    yield f"{estimate(cells, records)}; {duration(spent)} of work so far"
