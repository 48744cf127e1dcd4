"""What a leaderboard says and what it does not say, in sentences; the first thing people read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lm_calib_plugin.leaderboard import wording
from lm_calib_plugin.leaderboard.arrange import Group, Row, groups, headline, is_resolved
from lm_calib_plugin.leaderboard.tables import DENSE, NULL, Analysis, Comparison, Shares

UNRANKED = "Implementation noise: not ranked"
PARTS = {
    "source": "the calibration source",
    "method": "the method",
    "interaction": "source and method together",
    "draw": "the draw alone",
}
# More names than these are counted, not listed.
_NAMES = 4


def says(analysis: Analysis) -> list[str]:
    """Return what is resolved, one sentence each: leaders, differences, what varies."""
    if analysis.no_ranking:
        return []
    found = [_leaders(group) for group in groups(analysis)]
    found += [_differences(analysis, against) for against in ("baseline", "method", "dense")]
    found += [_varies(shares, analysis) for shares in analysis.shares]
    return [sentence for sentence in found if sentence]


def says_not(analysis: Analysis) -> list[str]:
    """Return what the numbers do not carry: what is open, thin, failed, missing or leaked."""
    found = [_open(analysis), _nulls(analysis), _thin(analysis), _leaked(analysis)]
    if analysis.failures or analysis.missing:
        found.append(
            f"{_count(len(analysis.failures), 'cell')} failed and"
            f" {_count(len(analysis.missing), 'cell')} did not run; their rows rest on fewer draws."
        )
    failed = [control.name for control in analysis.controls if control.passed is False]
    if failed:
        found.append(f"Controls that failed: {_list(failed)}.")
    found.append(
        "Only these base models, levels, tasks and conditions were measured;"
        " nothing follows for others."
    )
    return [sentence for sentence in found if sentence]


def sentence_of(pair: Comparison, analysis: Analysis) -> str:
    """Return a comparison in words, ending as a sentence does."""
    words = pair.words.strip()
    if not words:
        a, b = analysis.entry(pair.a), analysis.entry(pair.b)
        words = f"{wording.phrase(a)} against {wording.phrase(b)}: {pair.verdict}"
    return words if words.endswith((".", "!", "?")) else words + "."


def _leaders(group: Group) -> str:
    ranked = [row for row in group.rows if row.ranks is not None]
    if not ranked:
        return ""
    first = ranked[0]
    able = [row for row in ranked if row.ranks is not None and row.ranks[0] == 1]
    worst = first.entry.kept.worst if first.entry.kept else None
    keeps = ""
    if first.entry.kept and worst is not None:
        keeps = (
            f" It keeps {wording.percent(worst)} of the dense model on its worst task"
            f" ({first.entry.kept.worst_task})."
        )
    lead = f"{group.title}: {wording.phrase(first.entry)} stands first"
    if len(ranked) == 1:
        return f"{group.title}: {wording.phrase(first.entry)} was measured alone.{keeps}"
    if len(able) == 1:
        return f"{lead}, resolved against all {len(ranked) - 1} others.{keeps}"
    rest = _names([row for row in able if row is not first])
    return f"{lead}, but cannot be told from {rest}.{keeps}"


def _names(rows: Sequence[Row]) -> str:
    if len(rows) > _NAMES:
        return f"{len(rows)} others"
    return _list([wording.phrase(row.entry) for row in rows])


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _count(number: int, what: str) -> str:
    return f"{number or 'No'} {what}" + ("" if number == 1 else "s")


def _headline_pairs(analysis: Analysis, against: str = "") -> list[Comparison]:
    column = headline(analysis)
    return [
        pair
        for pair in analysis.comparisons
        if column is not None and pair.column == column.task and against in ("", pair.against)
    ]


_AGAINST = {
    "baseline": "a baseline calibration",
    "method": "another method",
    "dense": "the dense model",
}


def _differences(analysis: Analysis, against: str) -> str:
    pairs = _headline_pairs(analysis, against)
    sure = [pair for pair in pairs if is_resolved(pair)]
    if not pairs:
        return ""
    total = f"{len(sure)} of {_count(len(pairs), 'difference')} from {_AGAINST[against]}"
    verb = "is" if len(sure) == 1 else "are"
    if not sure or against == "dense":
        return f"{total} {verb} resolved."
    largest = max(sure, key=lambda pair: abs(pair.delta))
    return (
        f"{total} {verb} resolved; the largest: {_where(analysis, largest)}:"
        f" {sentence_of(largest, analysis)}"
    )


def _where(analysis: Analysis, pair: Comparison) -> str:
    entry = analysis.entry(pair.a)
    return f"{entry.model}, {entry.level}"


def _varies(shares: Shares, analysis: Analysis) -> str:
    column = headline(analysis)
    if column is None or shares.column != column.task or not shares.parts:
        return ""
    order = sorted(shares.parts, key=lambda part: -shares.parts[part].value)
    texts = []
    for part in order[:2]:
        share = shares.parts[part]
        bounds = ""
        if share.low is not None and share.high is not None:
            low, high = wording.percent(share.low, 0), wording.percent(share.high, 0)
            bounds = f" (95 % interval {low} to {high})"
        texts.append(f"{PARTS.get(part, part)} {wording.percent(share.value, 0)}{bounds}")
    return (
        f"{shares.model}, {shares.level}: of the variance of one draw's"
        f" {wording.heading(column)}, {' and '.join(texts)}."
    )


def _open(analysis: Analysis) -> str:
    pairs = _headline_pairs(analysis)
    unsure = [pair for pair in pairs if not is_resolved(pair)]
    if not unsure:
        return ""
    verb = "is" if len(unsure) == 1 else "are"
    text = f"{len(unsure)} of {_count(len(pairs), 'comparison')} {verb} not resolved"
    more = [pair.more_draws for pair in unsure if pair.more_draws is not None]
    if more:
        text += (
            f"; {len(more)} of them would need about {min(more)}"
            + (f" to {max(more)}" if max(more) > min(more) else "")
            + " more draws"
        )
    return text + "."


def _nulls(analysis: Analysis) -> str:
    """Tell of calibrations without sense that nothing was shown to beat."""
    open_: list[str] = []
    for group in groups(analysis):
        for row in group.rows:
            if row.entry.role == NULL and row.ranks is not None and row.ranks[0] == 1:
                open_.append(f"{group.title}, {wording.phrase(row.entry)}")
    if not open_:
        return ""
    shown = _list(open_) if len(open_) <= _NAMES else f"{len(open_)} rows"
    return f"A null calibration may be as good as the first row: {shown}."


def _thin(analysis: Analysis) -> str:
    single = [
        entry
        for entry in analysis.entries
        if entry.role not in (DENSE,) and entry.calibration and len(entry.draws) == 1
    ]
    if not single:
        return ""
    rows = "1 row has" if len(single) == 1 else f"{len(single)} rows have"
    return f"{rows} one draw: nothing is known about how far draws lie apart."


def _leaked(analysis: Analysis) -> str:
    leaks = [entry for entry in analysis.entries if entry.leaked]
    if not leaks:
        return ""
    most = max(leaks, key=lambda entry: entry.leaked or 0.0)
    rows = "1 row" if len(leaks) == 1 else f"{len(leaks)} rows"
    return (
        f"{rows} calibrated on text that holds evaluated items (at most"
        f" {wording.percent(most.leaked)} of a task, {most.id}): those scores may be too high."
    )


def lines(analysis: Analysis) -> Iterable[tuple[str, list[str]]]:
    """Yield both headings with their sentences."""
    yield "What this says", says(analysis)
    yield "What this does not say", says_not(analysis)
