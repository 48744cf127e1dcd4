"""What stands behind a row: all scores with their draws, hashes, warnings, commands."""

from __future__ import annotations

from lm_calib_plugin.drawing.markup import Markup, join, lines, tag
from lm_calib_plugin.leaderboard.report import wording
from lm_calib_plugin.leaderboard.tables import Analysis, Entry


def detail(analysis: Analysis, entry: Entry) -> Markup:
    """Return the part of a row that is folded at first."""
    return tag(
        "details",
        tag("summary", f"Draws, hashes and commands of {wording.name(entry)}"),
        tag("div", _troubles(entry), _scores(analysis, entry), _facts(entry), cls="facts"),
        _commands(entry),
    )


def _troubles(entry: Entry) -> Markup | None:
    found = [f"Failed: {error}" for error in entry.failed]
    if entry.missing:
        found.append(f"Not run: draws {', '.join(map(str, entry.missing))}")
    if entry.leaked:
        found.append(
            f"Leaked: {wording.percent(entry.leaked)} of the items of a task stand in the"
            " calibration text"
        )
    found += [f"Warning: {text}" for text in entry.warnings]
    return tag("ul", *(tag("li", text) for text in found), cls="troubles") if found else None


def _scores(analysis: Analysis, entry: Entry) -> Markup | None:
    rows = []
    for column in analysis.columns:
        score = entry.scores.get(column.task)
        if score is None:
            continue
        unit, like = column.unit, score.mean
        kept = entry.kept.tasks.get(column.task) if entry.kept else None
        draws = ", ".join(wording.number(value, unit, like=like) for value in score.draws)
        sd = wording.NOTHING if score.sd is None else wording.spread(score, unit, full=True)
        rows.append(
            tag(
                "tr",
                tag("th", wording.heading(column), tag("small", unit), scope="row"),
                tag("td", wording.number(score.mean, unit), cls="num"),
                tag("td", wording.interval(score.low, score.high, unit, like=like), cls="num"),
                tag("td", sd, cls="num"),
                tag("td", wording.interval(*wording.extremes(score), unit, like=like), cls="num"),
                tag("td", wording.number(score.item_error, unit, like=like), cls="num"),
                tag("td", wording.percent(kept), cls="num"),
                tag("td", draws, cls="wide"),
            )
        )
    if not rows:
        return None
    numbers = ["Mean", "95 % interval", "Over draws", "Min, max", "Item error", "Kept"]
    heads = [("", ""), *((name, "num") for name in numbers), ("Single draws", "")]
    cells = (tag("th", head, scope="col", cls=cls) for head, cls in heads)
    head = tag("thead", tag("tr", *cells))
    return tag("div", tag("table", head, tag("tbody", *rows)), cls="inner")


def _facts(entry: Entry) -> Markup:
    pairs: list[tuple[str, Markup | str]] = [("Entry", tag("code", entry.id))]
    if entry.draws:
        pairs.append(("Draws", ", ".join(map(str, entry.draws))))
    for title, hashes in (("Recipe keys", entry.keys), ("Calibration ids", entry.calib_ids)):
        if hashes:
            pairs.append((title, join((tag("code", value) for value in hashes), " ")))
    if entry.calibration_tokens is not None:
        pairs.append(("Calibration tokens", f"{entry.calibration_tokens}"))
    if entry.sparsity is not None:
        pairs.append(("Fraction removed", f"{entry.sparsity:g}"))
    if entry.bits is not None:
        pairs.append(("Bits per weight", f"{entry.bits:g}"))
    return tag("dl", *(tag("div", tag("dt", key), tag("dd", text)) for key, text in pairs))


def _commands(entry: Entry) -> Markup | None:
    if not entry.commands:
        return None
    title = (
        "Command" if len(entry.commands) == 1 else f"Commands, one a draw ({len(entry.commands)})"
    )
    copy = tag("button", "Copy", type="button", cls="copy quiet", hidden=True)
    code = tag("pre", tag("code", lines("\n".join(entry.commands))), tabindex=0)
    return tag("div", tag("p", title, copy, cls="command-title"), code, cls="commands")
