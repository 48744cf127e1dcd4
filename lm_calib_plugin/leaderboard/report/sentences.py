"""What a leaderboard says and what it does not say, in sentences; the first thing people read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lm_calib_plugin.leaderboard.report import wording
from lm_calib_plugin.leaderboard.report.arrange import (
    Group,
    Row,
    groups,
    headline,
    is_resolved,
    summed,
)
from lm_calib_plugin.leaderboard.tables import NULL, Analysis, Column, Comparison, Share

PARTS = {
    "source": "source",
    "method": "method",
    "interaction": "source and method together",
    "draw": "draw",
}


@dataclass(frozen=True)
class Sentence:
    """A sentence, and what it is about: a base model and level, or nothing of its own."""

    lead: str
    text: str


# More names than these are counted, not listed.
_NAMES = 4


def unranked(analysis: Analysis) -> str:
    """Return the headline of a leaderboard that must not be ranked, else nothing."""
    if not analysis.no_ranking:
        return ""
    noise = any(control.passed is False for control in analysis.controls)
    return "Implementation noise: not ranked" if noise else "Incomplete: not ranked"


def says(analysis: Analysis) -> list[Sentence]:
    """Return what is resolved, one sentence each: leaders, differences, what varies."""
    if analysis.no_ranking:
        return []
    found = [Sentence(group.title, _leaders(analysis, group)) for group in groups(analysis)]
    columns = summed(analysis)
    for against in ("baseline", "method", "dense"):
        for column in columns:
            text = _differences(analysis, against, column, len(columns) > 1)
            found.append(Sentence("", text))
    models = dict.fromkeys(shares.model for shares in analysis.shares)
    for column in columns:
        found += [Sentence(model, _varies(analysis, model, column)) for model in models]
    return [sentence for sentence in found if sentence.text]


def says_not(analysis: Analysis) -> list[Sentence]:
    """Return what the numbers do not carry: what is open, thin, failed, missing or leaked."""
    found = [_open(analysis), _nulls(analysis), _thin(analysis), _leaked(analysis)]
    if analysis.failures or analysis.missing:
        found.append(_fewer(analysis))
    failed = [control.name for control in analysis.controls if control.passed is False]
    if failed:
        found.append(f"Controls that failed: {_list(failed)}.")
    found.append(
        "Only these base models, levels, tasks and conditions were measured;"
        " nothing follows for others."
    )
    return [Sentence("", text) for text in found if text]


def sentence_of(pair: Comparison, analysis: Analysis) -> str:
    """Return a comparison in words, ending as a sentence does."""
    a, b = analysis.entry(pair.a), analysis.entry(pair.b)
    words = (pair.words.strip() or wording.verdict(pair)).removesuffix(".")
    return f"{wording.phrase(a)} against {wording.phrase(b)}: {words}."


def _leaders(analysis: Analysis, group: Group) -> str:
    column = headline(analysis)
    ranked = [row for row in group.rows if row.ranks is not None]
    if not ranked or column is None:
        return ""
    first, others, where = ranked[0], ranked[1:], wording.heading(column)
    better = [row for row in others if row.entry.id in first.beaten_by]
    alike = [row for row in others if row.entry.id not in first.beaten_by | first.beats]
    worst = first.entry.kept.worst if first.entry.kept else None
    keeps = ""
    if first.entry.kept and worst is not None:
        keeps = (
            f" It keeps {wording.percent(worst)} of the dense model on its worst task"
            f" ({first.entry.kept.worst_task})."
        )
    lead = f"{wording.phrase(first.entry)} stands first"
    if not others:
        return f"{wording.phrase(first.entry)} was measured alone.{keeps}"
    turned = _turned(others, where)
    if better:
        by = "its worst task" if worst is not None else "its mean"
        verb = "is" if len(better) == 1 else "are"
        text = f"{lead} by {by}; in {where} {_names(better)} {verb} better, resolved."
    elif alike:
        text = f"{lead}, but cannot be told from {_names(alike)} in {where}."
    else:
        text = f"{lead}, resolved against all {len(others)} others in {where}."
    return f"{text}{keeps}{turned}"


def _turned(rows: Sequence[Row], where: str) -> str:
    """Tell of rows that stand below others than which they are better for sure."""
    found = [
        (above, below)
        for place, below in enumerate(rows)
        for above in rows[:place]
        if below.entry.id in above.beaten_by
    ]
    if not found:
        return ""
    if len(found) > 1:
        return (
            f" {len(found)} pairs of other rows stand by their worst tasks the other way round than"
            f" {where} resolves them."
        )
    above, below = (wording.phrase(row.entry) for row in found[0])
    return (
        f" {above} stands above {below} by its worst task; in {where} {below} is better, resolved."
    )


def _fewer(analysis: Analysis) -> str:
    """Tell of cells that failed or did not run."""
    parts = [
        f"{_count(len(cells), 'cell')} {what}"
        for cells, what in ((analysis.failures, "failed"), (analysis.missing, "did not run"))
        if cells
    ]
    one = len(analysis.failures) + len(analysis.missing) == 1
    rest = "its row rests" if one else "their rows rest"
    return f"{' and '.join(parts)}; {rest} on fewer draws."


def _names(rows: Sequence[Row]) -> str:
    if len(rows) > _NAMES:
        return f"{len(rows)} others"
    return _list([wording.phrase(row.entry) for row in rows])


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _pairs_of(analysis: Analysis, column: Column, against: str = "") -> list[Comparison]:
    return [
        pair
        for pair in analysis.comparisons
        if pair.column == column.task and against in ("", pair.against)
    ]


def _differences(analysis: Analysis, against: str, column: Column, several: bool) -> str:
    """Tell how many differences are resolved in a column; it is named where there are several."""
    pairs = _pairs_of(analysis, column, against)
    sure = [pair for pair in pairs if is_resolved(pair)]
    if not pairs:
        return ""
    where = f"In {wording.heading(column)}, " if several else ""
    total = f"{where}{len(sure)} of {_count(len(pairs), 'difference')} from"
    total += f" {wording.AGAINST[against]}"
    verb = "is" if 1 in (len(sure), len(pairs)) else "are"
    if not sure or against == "dense":
        return f"{total} {verb} resolved."
    largest = max(sure, key=lambda pair: abs(pair.delta))
    entry = analysis.entry(largest.a)
    return (
        f"{total} {verb} resolved. The largest, {entry.model} at {entry.level}:"
        f" {sentence_of(largest, analysis)}"
    )


def _varies(analysis: Analysis, model: str, column: Column) -> str:
    """Tell the two largest shares of the variance, level by level."""
    levels = []
    for shares in analysis.shares:
        if (shares.model, shares.column) != (model, column.task):
            continue
        order = sorted(shares.parts, key=lambda part: -shares.parts[part].value)
        texts = [f"{PARTS.get(part, part)} {_share(shares.parts[part])}" for part in order[:2]]
        if texts:
            levels.append(" and ".join(texts) + (f" at {shares.level}" if shares.level else ""))
    if not levels:
        return ""
    name = wording.heading(column)
    return f"of the variance of one draw's {name}, {'; '.join(levels)} (95 % intervals)."


def _share(share: Share) -> str:
    text = wording.percent(share.value, 0)
    if share.low is None or share.high is None:
        return text
    return f"{text} [{wording.percent(share.low, 0)}, {wording.percent(share.high, 0)}]"


def _open(analysis: Analysis) -> str:
    pairs = [pair for column in summed(analysis) for pair in _pairs_of(analysis, column)]
    unsure = [pair for pair in pairs if not is_resolved(pair)]
    if not unsure:
        return ""
    verb = "is" if len(unsure) == 1 else "are"
    kinds = Counter(wording.verdict(pair) for pair in unsure)
    listed = _list([f"{number} {kind}" for kind, number in kinds.most_common()])
    text = f"{len(unsure)} of {_count(len(pairs), 'comparison')} {verb} not resolved ({listed})"
    more = [pair.more_draws for pair in unsure if pair.more_draws]
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
    return f"A null calibration may be as good as the best row: {shown}."


def _thin(analysis: Analysis) -> str:
    single = [
        entry for entry in analysis.entries if wording.calibration(entry) and len(entry.draws) == 1
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


def lines(analysis: Analysis) -> Iterable[tuple[str, list[Sentence]]]:
    """Yield both headings with their sentences."""
    yield "What this says", says(analysis)
    yield "What this does not say", says_not(analysis)
