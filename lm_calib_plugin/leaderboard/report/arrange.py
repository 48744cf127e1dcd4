"""In which order rows stand, and which ranks may be told: one place for all files of a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lm_calib_plugin.leaderboard.tables import (
    AVERAGES,
    DENSE,
    Analysis,
    Column,
    Comparison,
    Entry,
    Score,
)

RESOLVED = ("resolved_better", "resolved_worse")


@dataclass(frozen=True)
class Row:
    """An entry where it stands; ``ranks`` are the best and the worst rank it may have.

    A rank is told by the headline column alone, as far as pairs are resolved: "1 to 3" may be the
    first and may be the third. None: a dense model, or a table that must not be ranked. ``beats``
    and ``beaten_by`` are the ids of rows that are worse and better for sure; they may stand above
    or below, as rows are sorted by something else.
    """

    entry: Entry
    ranks: tuple[int, int] | None = None
    beats: frozenset[str] = frozenset()
    beaten_by: frozenset[str] = frozenset()

    @property
    def rank(self) -> str:
        """The ranks as people read them."""
        if self.ranks is None:
            return ""
        low, high = self.ranks
        return str(low) if low == high else f"{low}–{high}"


@dataclass(frozen=True)
class Group:
    """One table: everything of one base model at one level, the dense model first."""

    model: str
    level: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Base model and level."""
        return " · ".join(part for part in (self.model, self.level) if part)


def groups(analysis: Analysis) -> tuple[Group, ...]:
    """Return the tables of a leaderboard, models and levels in the order of the grid.

    Rows are sorted by worst-task retention, then by geometric mean, then by mean, then by the
    headline column, which alone sorts them where there is no retention; where nothing may be
    ranked they stay as in the grid. Levels are never pooled.
    """
    found: dict[tuple[str, str], list[Entry]] = {}
    dense: dict[str, list[Entry]] = {}
    for entry in analysis.entries:
        if entry.role == DENSE:
            dense.setdefault(entry.model, []).append(entry)
        else:
            found.setdefault((entry.model, entry.level), []).append(entry)
    for model, entries in dense.items():
        if not any(key[0] == model for key in found):
            found[model, entries[0].level] = []
    order = {model: n for n, model in enumerate(dict.fromkeys(e.model for e in analysis.entries))}
    pairs = resolved_pairs(analysis)
    return tuple(
        Group(
            model,
            level,
            (
                *(Row(entry) for entry in dense.get(model, ())),
                *_ranked(analysis, found[model, level], pairs),
            ),
        )
        for model, level in sorted(found, key=lambda key: order[key[0]])
    )


def headline(analysis: Analysis) -> Column | None:
    """Return the column that ranks are told by: an average of tasks, else the first one."""
    return next(iter(summed(analysis)), None)


def summed(analysis: Analysis) -> list[Column]:
    """Return the columns that sum up tasks, of points first; the first task where none does."""
    by_name = {column.task: column for column in analysis.columns}
    named = [by_name[name] for name in AVERAGES if name in by_name]
    return named or list(analysis.columns[:1])


def is_resolved(comparison: Comparison) -> bool:
    """Tell whether a difference may be called one."""
    return comparison.verdict in RESOLVED


def resolved_pairs(analysis: Analysis) -> dict[tuple[str, str], float | None]:
    """Return what comparisons in the headline column say of pairs of entries.

    Returns
    -------
    dict
        (a, b) -> the difference by which a is better, negative for worse; None where it is not
        resolved. Each pair stands in it both ways.
    """
    column = headline(analysis)
    found: dict[tuple[str, str], float | None] = {}
    for pair in analysis.comparisons:
        if column is None or pair.column != column.task:
            continue
        better = pair.delta if column.higher_is_better else -pair.delta
        found[pair.a, pair.b] = better if is_resolved(pair) else None
        found[pair.b, pair.a] = -better if is_resolved(pair) else None
    return found


def _ranked(
    analysis: Analysis, entries: Sequence[Entry], pairs: dict[tuple[str, str], float | None]
) -> Iterable[Row]:
    if analysis.no_ranking:
        return [Row(entry) for entry in entries]
    column = headline(analysis)
    rows = sorted(entries, key=lambda entry: _strength(entry, column))
    scored = [entry for entry in rows if _score(entry, column) is not None]
    beats = _beaten(scored, column, pairs) if column is not None else {}
    found = []
    for entry in rows:
        if entry.id not in beats:
            found.append(Row(entry))
            continue
        worse = frozenset(beats[entry.id])
        better = frozenset(id for id, others in beats.items() if entry.id in others)
        ranks = (1 + len(better), len(scored) - len(worse))
        found.append(Row(entry, ranks, worse, better))
    return found


def _beaten(
    rows: Sequence[Entry], column: Column, pairs: dict[tuple[str, str], float | None]
) -> dict[str, set[str]]:
    """Return, for each row, the rows that it beats for sure, wherever they stand.

    A pair that was not compared counts, too, where a third row stands between for sure, unless the
    intervals of the pair say the contrary.
    """
    found = {a.id: {b.id for b in rows if b is not a and _beats(a, b, column, pairs)} for a in rows}
    for between in found:
        for own, worse in found.items():
            if between in worse:
                worse |= {
                    id
                    for id in found[between]
                    if id != own and (own, id) not in pairs and own not in found[id]
                }
    return found


def _score(entry: Entry, column: Column | None) -> Score | None:
    return entry.scores.get(column.task) if column is not None else None


def _strength(entry: Entry, column: Column | None) -> tuple[float, ...]:
    """Return what rows are sorted by, best first, missing last."""
    kept, score = entry.kept, _score(entry, column)
    values = (kept.worst, kept.geometric_mean, kept.mean) if kept else (None, None, None)
    numbers = [math.inf if value is None else -value for value in values]
    if score is None or column is None:
        return (*numbers, math.inf)
    return (*numbers, -score.mean if column.higher_is_better else score.mean)


def _beats(a: Entry, b: Entry, column: Column, pairs: dict[tuple[str, str], float | None]) -> bool:
    """Tell whether a is better for sure: by their comparison, else by intervals that are apart."""
    if (a.id, b.id) in pairs:
        return (pairs[a.id, b.id] or 0.0) > 0
    first, second = a.scores[column.task], b.scores[column.task]
    if not column.higher_is_better:
        first, second = second, first
    return first.low is not None and second.high is not None and first.low > second.high
