"""What rankings of blocks say, and whether they agree: words, tables, plots."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

from lm_calib_plugin.diagnostics.document import Figure, Section, Table
from lm_calib_plugin.diagnostics.sensitivity import figures
from lm_calib_plugin.diagnostics.sensitivity.depth import DepthResult, Ranking
from lm_calib_plugin.diagnostics.sensitivity.options import LOSS

TITLE = "Which blocks would be missed least"
# Kendall's tau from which two rankings are said to agree, and below which to disagree.
AGREE, DISAGREE = 0.8, 0.5
_FIRST = 3  # parts that are named
_CAPTION = (
    "rank on {text}: 1 would be removed first; in brackets the importance: cosine 1 - cos of input "
    "and output; l1, l2 relative size of what is added; logit mean 2-norm of the change of the "
    "logits; loss rise of the loss without it, nats."
)


def depth_findings(result: DepthResult) -> list[str]:
    """Return what was found, the answer first."""
    first = _first(result)
    text = first[0].text
    count = max(_FIRST, len(result.parts) // 10)
    orders = [f"{_numbers(r.order[:count])} by {r.metric}" for r in first]
    last = [f"{r.order[-1]} by {r.metric}" for r in first]
    same = len({r.order[-1] for r in first}) == 1
    found = [
        f"the {result.unit}s that would go first on {text}: {'; '.join(orders)}.",
        f"missed most: {first[0].order[-1] if same else ', '.join(last)}"
        + (" by every metric." if same and len(first) > 1 else "."),
    ]
    return found + _metrics(result, first) + _texts(result) + _harmless(result, first)


def depth_section(result: DepthResult) -> Section:
    """Return the evidence: ranks of all parts, tau of every two rankings, importances."""
    first = _first(result)
    tables = [_ranks(result, own) for own in _sets(result)]
    if len(first) > 1:
        rows = [(a.metric, *(_known(result.tau(a, b)) for b in first)) for a in first]
        head = ("metric", *(r.metric for r in first))
        tables.append(Table(head, rows, f"Kendall's tau-b of metrics on {first[0].text}."))
    pairs = _pairs(result)
    if pairs:
        head = ("text", "and", *_of_metrics(result))
        rows = [(one, other, *taus) for one, other, taus in pairs]
        caption = "Kendall's tau-b between texts, and between draws of one; mean over draws."
        tables.append(Table(head, rows, caption))
    plots = [
        Figure(
            f"Importance of {result.unit}s by metric",
            "Of each metric as a share of its largest value; the lowest would be removed first.",
            " ".join(depth_findings(result)),
            partial(figures.importances, first, [r.metric for r in first], result.unit),
        )
    ]
    same = [r for r in result.rankings if r.metric == first[-1].metric]
    if len(same) > 1:
        names = [_set_name(r, result) for r in same]
        plots.append(
            Figure(
                f"Importance of {result.unit}s by text",
                f"By {same[0].metric}, as a share of the largest value.",
                " ".join(_texts(result)),
                partial(figures.importances, same, names, result.unit),
            )
        )
    sentences = [
        "Ranked on text, never on items of a task: judging by a test split would leak it into what "
        "is removed."
    ]
    if not any(one == other for one, other, _ in pairs):
        sentences.append(
            "One draw of each text: what another draw would change is not known (--draws 2)."
        )
    return Section(TITLE, sentences, tables, plots)


def _metrics(result: DepthResult, first: Sequence[Ranking]) -> list[str]:
    pairs = [(result.tau(a, b), a, b) for a, b in itertools.combinations(first, 2)]
    known = [pair for pair in pairs if not math.isnan(pair[0])]
    if not known:
        return []
    low, a, b = min(known, key=lambda pair: pair[0])
    high, c, d = max(known, key=lambda pair: pair[0])
    text = f"metrics {_agreement(low)}: {a.metric} and {b.metric} are least alike (tau {low:.2f})"
    if len(known) > 1:
        text += f", {c.metric} and {d.metric} most (tau {high:.2f})"
    return [f"{text}."]


def _texts(result: DepthResult) -> list[str]:
    """Return how rankings depend on the text, beside how they depend on its draw."""
    metrics = _of_metrics(result)
    found, floors = [], dict.fromkeys(metrics, 1.0)
    pairs = _pairs(result)
    for one, other, taus in pairs:
        if one == other:
            known = zip(metrics, taus, strict=True)
            floors |= {m: min(floors[m], tau) for m, tau in known if tau is not None}
    for one, other, taus in pairs:
        known = [(m, tau) for m, tau in zip(metrics, taus, strict=True) if tau is not None]
        if not known:
            continue
        words = ", ".join(f"by {metric} {_agreement(tau)} (tau {tau:.2f})" for metric, tau in known)
        if one == other:
            found.append(f"rankings on two draws of {one}: {words}.")
            continue
        text = f"rankings on {one} and on {other}: {words}"
        below = [m for m, tau in known if tau < floors[m]]
        if any(a == b for a, b, _ in pairs):
            text += (
                f"; by {', '.join(below)} they differ more than draws of one text do"
                if below
                else "; they differ no more than draws of one text do"
            )
        found.append(f"{text}.")
    return found


def _harmless(result: DepthResult, first: Sequence[Ranking]) -> list[str]:
    """Return the sentence on parts without which the loss is not higher."""
    for ranking in first:
        useless = [i for i, value in enumerate(ranking.values) if value <= 0]
        if ranking.metric == LOSS and useless:
            return [
                f"the loss on {ranking.text} is no higher without {result.unit} "
                f"{_numbers(useless)}, one at a time."
            ]
    return []


def _ranks(result: DepthResult, own: Sequence[Ranking]) -> Table:
    rows = [
        (part, *(f"{r.ranks[i]} ({r.values[i]:.3g})" for r in own))
        for i, part in enumerate(result.parts)
    ]
    caption = _CAPTION.format(text=_set_name(own[0], result))
    return Table((result.unit, *(r.metric for r in own)), rows, caption, shown=48)


def _pairs(result: DepthResult) -> list[tuple[str, str, list[float | None]]]:
    """Return tau by metric of every two texts, and of the draws of each text with several."""
    texts = list(dict.fromkeys(r.text for r in result.rankings))
    found = []
    for one, other in itertools.combinations_with_replacement(texts, 2):
        taus = [_mean_tau(result, metric, one, other) for metric in _of_metrics(result)]
        if any(tau is not None for tau in taus):
            found.append((one, other, taus))
    return found


def _mean_tau(result: DepthResult, metric: str, one: str, other: str) -> float | None:
    """Return the mean tau of rankings of two texts, or of different draws of one."""
    first = [r for r in result.rankings if (r.metric, r.text) == (metric, one)]
    second = [r for r in result.rankings if (r.metric, r.text) == (metric, other)]
    pairs = [(a, b) for a in first for b in second if one != other or a.draw < b.draw]
    taus = [tau for tau in (result.tau(a, b) for a, b in pairs) if not math.isnan(tau)]
    return sum(taus) / len(taus) if taus else None


def _agreement(tau: float) -> str:
    tau = round(tau, 2)  # what is shown decides
    if tau >= AGREE:
        return "agree"
    return "disagree" if tau < DISAGREE else "agree in part"


def _sets(result: DepthResult) -> list[list[Ranking]]:
    """Return the rankings of each draw of each text."""
    found: dict[tuple[str, int], list[Ranking]] = {}
    for ranking in result.rankings:
        found.setdefault((ranking.text, ranking.draw), []).append(ranking)
    return list(found.values())


def _first(result: DepthResult) -> list[Ranking]:
    return _sets(result)[0]


def _of_metrics(result: DepthResult) -> list[str]:
    return list(dict.fromkeys(r.metric for r in result.rankings))


def _set_name(ranking: Ranking, result: DepthResult) -> str:
    several = any(r.draw != result.rankings[0].draw for r in result.rankings)
    return f"{ranking.text}, draw {ranking.draw + 1}" if several else ranking.text


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _numbers(parts: Sequence[int]) -> str:
    return ", ".join(map(str, parts))
