"""The table of comparisons, with a verdict in words for each."""

from __future__ import annotations

from lm_calib_plugin.drawing.markup import Markup, join, tag
from lm_calib_plugin.leaderboard.report import wording
from lm_calib_plugin.leaderboard.report.arrange import RESOLVED, headline, is_resolved
from lm_calib_plugin.leaderboard.tables import Analysis, Comparison

_HEADS = (
    ("verdict", "Verdict", "text", "ascending"),
    ("pair", "a against b", "text", "ascending"),
    ("task", "Task", "text", "ascending"),
    ("delta", "a − b", "number", "descending"),
    ("items", "Items better / worse", "number", "descending"),
    ("chance", "P(a better)", "number", "descending"),
    ("p", "p (Holm)", "number", "ascending"),
    ("words", "In words", "", ""),
)


def comparisons(analysis: Analysis) -> Markup | None:
    """Return filters and table of all comparisons."""
    if not analysis.comparisons:
        return None
    head = tag("tr", *(_head(*each) for each in _HEADS))
    scales = _scales(analysis)
    rows = [_row(analysis, pair, scales) for pair in analysis.comparisons]
    whole = tag(
        "table",
        tag("caption", tag("span", "All comparisons", cls="unseen")),
        tag("thead", head),
        tag("tbody", *rows),
        cls="cards",
        id="pairs",
    )
    region = tag("div", whole, cls="scroll", tabindex=0, role="region", aria_label="Comparisons")
    nothing = tag("p", "No comparison fits these filters.", cls="hint", id="no-pairs", hidden=True)
    return join([tag("p", wording.COMPARISONS, cls="hint"), _filters(analysis), region, nothing])


def _filters(analysis: Analysis) -> Markup:
    first = headline(analysis)
    tasks = [tag("option", "all", value="")]
    for column in analysis.columns:
        default = column is first
        tasks.append(
            tag("option", wording.heading(column), value=column.task, data_default=default)
        )
    kinds = [tag("option", "all", value="")]
    for against in dict.fromkeys(pair.against for pair in analysis.comparisons):
        kinds.append(tag("option", wording.AGAINST.get(against, against), value=against))
    box = tag("input", type="checkbox", name="resolved", value="1")
    return tag(
        "form",
        tag("label", tag("span", "Task"), tag("select", *tasks, name="task")),
        tag("label", tag("span", "Against"), tag("select", *kinds, name="against")),
        tag("label", box, "Resolved only", cls="check"),
        tag("span", tag("output", cls="count", aria_live="polite"), cls="end"),
        id="pair-filters",
        hidden=True,
        aria_label="Filters of comparisons",
    )


def _head(key: str, title: str, kind: str, first: str) -> Markup:
    cls = "num" if kind == "number" else ""
    if not kind:
        return tag("th", title, scope="col", data_c=key)
    button = tag("button", title, type="button", data_first=first)
    return tag("th", button, scope="col", data_c=key, data_kind=kind, cls=cls)


def _row(analysis: Analysis, pair: Comparison, scales: dict[tuple[str, str], float]) -> Markup:
    a, b = analysis.entry(pair.a), analysis.entry(pair.b)
    kind = wording.verdict(pair)
    good, bad = RESOLVED
    state = {good: "good", bad: "bad"}.get(pair.verdict, "open")
    where = tag("small", f"{a.model} · {a.level}")
    names = [tag("b", wording.name(a)), " against ", tag("span", wording.name(b)), where]
    bounds = wording.interval(pair.low, pair.high, pair.unit, signed=True, like=pair.delta)
    delta = [
        tag(
            "div",
            _forest(pair, scales[pair.column, pair.against]),
            tag("b", wording.number(pair.delta, pair.unit, signed=True)),
            cls="lead",
        ),
        tag("small", bounds),
    ]
    task = pair.column
    turns = [tag("small", wording.turns(pair))] if pair.flips else []
    items = wording.NOTHING if pair.beneficial is None else wording.items(pair)
    cells: list[tuple[float | str | None, list[Markup | str], str]] = [
        (kind, [tag("span", kind, cls=f"verdict {state}")], ""),
        (f"{wording.name(a)} {wording.name(b)}", [*names], ""),
        (task, [task, tag("small", pair.unit)], ""),
        (pair.delta, [*delta], "num"),
        (pair.beneficial, [items], "num"),
        (pair.probability_better, [wording.percent(pair.probability_better, 0)], "num"),
        (pair.p_holm, [wording.probability(pair.p_holm)], "num"),
        (None, [pair.words, *turns], "words"),
    ]
    found = []
    for (key, title, *_), (value, content, cls) in zip(_HEADS, cells, strict=True):
        shown = None if value is None else repr(value) if isinstance(value, float) else str(value)
        found.append(
            tag("td", tag("div", *content), cls=cls, data_c=key, data_v=shown, data_label=title)
        )
    return tag(
        "tr",
        *found,
        cls="row",
        data_model=a.model,
        data_level=a.level,
        data_method=a.method,
        data_calibration=a.calibration,
        data_role=a.role,
        data_task=pair.column,
        data_against=pair.against,
        data_resolved="1" if is_resolved(pair) else None,
        data_words=f"{a.id} {b.id} {kind}".lower(),
    )


def _scales(analysis: Analysis) -> dict[tuple[str, str], float]:
    """Return how far differences of each column and kind reach from 0."""
    found: dict[tuple[str, str], float] = {}
    for pair in analysis.comparisons:
        reach = [abs(v) for v in (pair.low, pair.high, pair.delta) if v is not None]
        key = (pair.column, pair.against)
        found[key] = max(found.get(key, 0.0), *reach)
    return found


def _forest(pair: Comparison, reach: float) -> Markup | str:
    """Draw difference and interval about 0; all of a column share one scale."""
    if not 0 < reach < float("inf"):
        return ""

    def place(value: float) -> float:
        return round(50 + 47 * value / reach, 1)

    parts = [tag("line", x1=50, x2=50, y1=0, y2=14, cls="zero")]
    if pair.low is not None and pair.high is not None:
        parts.append(tag("line", x1=place(pair.low), x2=place(pair.high), y1=7, y2=7, cls="span"))
    parts.append(tag("circle", cx=place(pair.delta), cy=7, r=2.6, cls="dot"))
    cls = "forest" if is_resolved(pair) else "forest unsure"
    return tag("svg", *parts, viewBox="0 0 100 14", cls=cls, aria_hidden="true")
