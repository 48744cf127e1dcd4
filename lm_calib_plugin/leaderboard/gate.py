"""``--fail-below recovery=0.95``: what a pipeline refuses to let through."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields

from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.leaderboard.tables import COMPRESSED, DATA_FREE, Analysis, Kept

MEASURES = tuple(f.name for f in fields(Kept) if f.name not in ("worst_task", "tasks"))


def read_gates(texts: Sequence[str]) -> dict[str, float]:
    """Return measure -> limit of ``MEASURE=LIMIT`` texts.

    Raises
    ------
    UserError
        For a measure that there is not, and a limit that is no fraction of the dense model.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, limit = text.partition("=")
        if name not in MEASURES:
            raise UserError(
                "fail-below", f"got {text!r}", nearest(name, MEASURES), f"one of {listed(MEASURES)}"
            )
        try:
            found[name] = float(limit)
        except ValueError:
            found[name] = -1.0
        if not 0 < found[name] <= 2:
            raise UserError(
                "fail-below", f"got {text!r}", "a part of the dense score", f"such as {name}=0.95"
            )
    return found


def shortfalls(
    analysis: Analysis, gates: Mapping[str, float], methods: Collection[str]
) -> list[str]:
    """Return a line for each row that is below a limit, or has nothing to be judged by.

    Rows of controls are not judged; those of ``methods``, which a grid names, are none. A
    leaderboard that must not be ranked, or has no row to be judged, passes no gate.
    """
    if not gates:
        return []
    found = list(analysis.no_ranking)
    judged = [
        entry
        for entry in analysis.entries
        if entry.role == COMPRESSED or (entry.role == DATA_FREE and entry.method in methods)
    ]
    if not judged:
        found.append("no row to be judged")
    for entry in judged:
        for name, limit in gates.items():
            value = getattr(entry.kept, name) if entry.kept is not None else None
            if value is None:
                found.append(f"{entry.id}: no {name}; it needs tasks with a score in points")
            elif value < limit:
                found.append(f"{entry.id}: {name} {value:.4f} is below {limit:g}")
    return found
