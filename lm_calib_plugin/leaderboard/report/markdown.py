"""An Analysis as Markdown that reads well as plain text, too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lm_calib_plugin.drawing import words
from lm_calib_plugin.export.card_text import block, code, plain, table
from lm_calib_plugin.leaderboard.report import arrange, sentences, wording
from lm_calib_plugin.leaderboard.report.arrange import Group, groups
from lm_calib_plugin.leaderboard.report.plots import left_out
from lm_calib_plugin.leaderboard.tables import AVERAGES, Analysis, Column, Comparison, Entry, Score


def markdown(analysis: Analysis, plots: Sequence[tuple[str, str]] | None = ()) -> str:
    """Return the whole report.

    Parameters
    ----------
    plots
        Title and relative address of each; None where they could not be drawn.
    """
    parts = [f"# {plain(analysis.name)}", plain(analysis.description), *_head(analysis)]
    parts += _verdicts(analysis)
    parts += _tables(analysis)
    parts += _comparisons(analysis)
    parts += _shares(analysis)
    parts += _rankings(analysis)
    parts += _agreements(analysis)
    parts += _plots(analysis, plots)
    parts += _list("Failures", (f"{plain(c)}: {plain(e)}" for c, e in analysis.failures))
    parts += _list("Missing", map(plain, analysis.missing))
    parts += _list("Notes", map(plain, analysis.notes))
    parts += _commands(analysis)
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(analysis: Analysis) -> list[str]:
    if not analysis.no_ranking:
        return []
    title = sentences.unranked(analysis)
    reasons = "\n".join(f"> * {plain(reason)}" for reason in analysis.no_ranking)
    return [f"> **{title}.** Rows stand as in the grid.\n>\n{reasons}"]


def _verdicts(analysis: Analysis) -> list[str]:
    return [
        part
        for title, several in sentences.lines(analysis)
        for part in _list(title, map(_sentence, several))
    ]


def _sentence(said: sentences.Sentence) -> str:
    return (f"**{plain(said.lead)}**: " if said.lead else "") + plain(said.text)


def _list(title: str, lines: Iterable[str]) -> list[str]:
    found = [f"* {line}" for line in lines]
    return [f"## {title}", "\n".join(found)] if found else []


def _tables(analysis: Analysis) -> list[str]:
    parts = []
    if analysis.controls:
        word = {True: "passed", False: "**failed**", None: wording.NOTHING}
        checks = wording.controls(analysis.controls)
        rows = [[plain(c.name), word[c.passed], plain(c.words)] for c in checks]
        parts += ["## Controls", table(["control", "", "what was seen"], rows)]
    if analysis.conditions:
        rows = [[plain(key), plain(found)] for key, found in wording.conditions(analysis)]
        parts += ["## Conditions", table(["condition", "value"], rows)]
    if analysis.columns:
        rows = [[plain(wording.heading(c)), plain(wording.meaning(c))] for c in analysis.columns]
        parts += ["## Tasks", table(["column", "meaning"], rows)]
    legend = plain(wording.legend(analysis, arrange.headline(analysis)))
    for group in groups(analysis):
        parts.append(f"## {plain(group.title)}")
        if analysis.no_ranking:
            parts.append(f"*{sentences.unranked(analysis)}.*")
        parts.append(legend)
        legend = ""
        parts.append(_table(analysis, group))
    return parts


def _table(analysis: Analysis, group: Group) -> str:
    ordered = _columns(analysis)
    head = ["rank", "method", "calibration", "role", "draws", "worst task", "geometric mean"]
    head += [plain(f"{wording.heading(c)} [{c.unit}]") for c in ordered]
    head += ["mean retention", "recovery"]
    rows = []
    for row in group.rows:
        entry, kept = row.entry, row.entry.kept
        worst = wording.percent(kept.worst) if kept else wording.NOTHING
        if kept and kept.worst_task:
            worst += f" ({plain(kept.worst_task)})"
        rows.append(
            [
                row.rank or wording.NOTHING,
                plain(entry.method or wording.NOTHING),
                plain(wording.calibration(entry) or wording.NOTHING),
                plain(entry.role),
                _draws(entry),
                worst,
                wording.percent(kept.geometric_mean) if kept else wording.NOTHING,
                *(_score(entry.scores.get(c.task), c) for c in ordered),
                wording.percent(kept.mean) if kept else wording.NOTHING,
                wording.percent(kept.recovery) if kept else wording.NOTHING,
            ]
        )
    return table(head, rows)


def _columns(analysis: Analysis) -> list[Column]:
    """Return the average first, then the tasks."""
    return sorted(analysis.columns, key=lambda column: column.task not in AVERAGES)


def _draws(entry: Entry) -> str:
    parts = [str(len(entry.draws))]
    if entry.failed:
        parts.append(f"{len(entry.failed)} failed")
    if entry.missing:
        parts.append(f"{len(entry.missing)} missing")
    return ", ".join(parts)


def _score(score: Score | None, column: Column) -> str:
    if score is None:
        return wording.NOTHING
    parts = [wording.short(score.mean, column.unit), f"({wording.spread(score, column.unit)})"]
    return " ".join([*parts, plain(wording.bounds(score, column.unit))]).rstrip()


def _comparisons(analysis: Analysis) -> list[str]:
    if not analysis.comparisons:
        return []
    parts = [
        "## Comparisons",
        wording.COMPARISONS,
    ]
    kinds = dict.fromkeys(pair.against for pair in analysis.comparisons)
    for against in kinds:
        pairs = [pair for pair in analysis.comparisons if pair.against == against]
        parts.append(f"### Against {plain(wording.AGAINST.get(against, against))}")
        parts.append(_pairs(analysis, pairs))
    return parts


def _pairs(analysis: Analysis, pairs: Sequence[Comparison]) -> str:
    head = ["model, level", "a", "b", "task", "a − b", "better / worse", "P", "p (Holm)", "verdict"]
    names = {column.task: wording.heading(column) for column in analysis.columns}
    rows = []
    for pair in pairs:
        a, b = analysis.entry(pair.a), analysis.entry(pair.b)
        said = f"**{plain(wording.verdict(pair))}**: {plain(pair.words)}"
        bounds = wording.interval(pair.low, pair.high, pair.unit, signed=True, like=pair.delta)
        rows.append(
            [
                plain(f"{a.model}, {a.level}"),
                plain(wording.name(a)),
                plain(wording.name(b)),
                plain(names.get(pair.column, pair.column)),
                f"{wording.number(pair.delta, pair.unit, signed=True)} {plain(bounds)}",
                wording.items(pair),
                wording.percent(pair.probability_better, 0),
                plain(wording.probability(pair.p_holm)),
                "; ".join(filter(None, [said, plain(wording.turns(pair))])),
            ]
        )
    return table(head, rows)


def _shares(analysis: Analysis) -> list[str]:
    if not analysis.shares:
        return []
    names = list(dict.fromkeys(part for shares in analysis.shares for part in shares.parts))
    titles = {column.task: wording.heading(column) for column in analysis.columns}
    rows = []
    for shares in analysis.shares:
        cells = []
        for part in names:
            share = shares.parts.get(part)
            if share is None:
                cells.append(wording.NOTHING)
                continue
            text = wording.percent(share.value, 0)
            if share.low is not None and share.high is not None:
                text += (
                    (f" [{wording.percent(share.low, 0)}, {wording.percent(share.high, 0)}]")
                    .replace("[", "\\[")
                    .replace("]", "\\]")
                )
            text += " (estimate below 0)" if share.clipped else ""
            if part in shares.naive:
                text += f"; naive {wording.percent(shares.naive[part], 0)}"
            cells.append(text)
        task = titles.get(shares.column, shares.column)
        rows.append([plain(f"{shares.model}, {shares.level}"), plain(task), *cells])
    return [
        "## What varies",
        plain(wording.shares(analysis)),
        table(["model, level", "task", *map(plain, names)], rows),
    ]


def _rankings(analysis: Analysis) -> list[str]:
    if not analysis.rankings or analysis.no_ranking:
        return []
    titles = {column.task: wording.heading(column) for column in analysis.columns}
    rows = []
    for ranking in analysis.rankings:
        entries = [analysis.entry(id) for id in ranking.entries]
        first = ranking.ranks[0][0] if ranking.ranks and ranking.ranks[0] else None
        rows.append(
            [
                plain(f"{ranking.model}, {ranking.level}, {ranking.fixed}"),
                plain(titles.get(ranking.column, ranking.column)),
                plain(" > ".join(wording.name(entry) for entry in entries)),
                wording.NOTHING if ranking.tau is None else wording.number(ranking.tau),
                wording.percent(first, 0),
            ]
        )
    return [
        "## Rankings from one draw",
        wording.RANKINGS,
        table(["model, level, fixed", "task", "by the means", "tau-b", "first stays first"], rows),
    ]


def _agreements(analysis: Analysis) -> list[str]:
    if not analysis.agreements or analysis.no_ranking:
        return []
    parts = ["## Do rankings agree?", plain(wording.AGREEMENTS)]
    for found in analysis.agreements:
        names = [plain(name) for name in found.names]
        rows = [
            [name, *map(wording.tau, taus)] for name, taus in zip(names, found.taus, strict=True)
        ]
        parts += [f"**{plain(wording.agreement(found))}**", table(["", *names], rows)]
    return parts


def _plots(analysis: Analysis, plots: Sequence[tuple[str, str]] | None) -> list[str]:
    if plots is None:
        return ["## Plots", f"{words.NO_PLOTS} To install it: {code(words.INSTALL_PLOTS)}"]
    if not plots:
        return []
    return [
        "## Plots",
        plain(left_out(analysis)),
        *(f"![{plain(title)}](<{address}>)" for title, address in plots),
    ]


def _commands(analysis: Analysis) -> list[str]:
    rows = [entry for entry in analysis.entries if entry.commands]
    if not rows:
        return []
    parts = ["## Commands", "Each row again, one command a draw."]
    for entry in rows:
        about = [f"* key {code(key)}" for key in entry.keys]
        about += [f"* calibration {code(id)}" for id in entry.calib_ids]
        about += [f"* warning: {plain(text)}" for text in entry.warnings]
        about += [f"* failed: {plain(text)}" for text in entry.failed]
        parts.append(f"<details><summary>{plain(entry.id)}</summary>")
        parts.append("\n".join(about))
        parts.append(block("\n".join(entry.commands), "sh"))
        parts.append("</details>")
    return parts
