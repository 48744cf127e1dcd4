"""What rankings of blocks say, and whether they agree: words, tables, plots."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

from lm_calib_plugin.diagnostics.document import Figure, Section, Table
from lm_calib_plugin.diagnostics.sensitivity import figures
from lm_calib_plugin.diagnostics.sensitivity.depth import DepthResult, Ranking

TITLE = "Which blocks would be missed least"
# Kendall's tau from which two rankings are said to agree, and below which to disagree.
AGREE, DISAGREE = 0.8, 0.5
_CAPTION = (
    "rank 1 would be removed first; in brackets the importance: cosine 1 - cos of input and "
    "output; l1, l2 relative size of what is added; logit mean 2-norm of the change of the logits; "
    "loss rise of the loss without it, nats."
)


def depth_findings(result: DepthResult) -> list[str]:
    """Return what was found, the answer first."""
    first = [r for r in result.rankings if (r.text, r.draw) == _first(result)]
    count = max(1, len(result.parts) // 10)
    found = [
        f"by {r.metric} on {r.text} the {result.unit}s that would go first are "
        f"{_numbers(r.order[: max(3, count)])}, and last {_numbers(r.order[-2:][::-1])}."
        for r in first
    ]
    found += _metrics(result, first)
    found += _texts(result)
    found += _draws(result)
    found += _harmless(result, first)
    return found


def depth_section(result: DepthResult) -> Section:
    """Return the evidence: ranks of all parts, tau of every two rankings, importances."""
    names = [_name(r, result) for r in result.rankings]
    rows = [
        (part, *(f"{r.ranks[i]} ({r.values[i]:.3g})" for r in result.rankings))
        for i, part in enumerate(result.parts)
    ]
    ranks = Table((result.unit, *names), rows, _CAPTION, shown=48)
    pairs = [
        (_name(a, result), _name(b, result), _known(result.tau(a, b)))
        for a, b in itertools.combinations(result.rankings, 2)
    ]
    agreement = Table(("ranking", "and", "tau"), pairs, "Kendall's tau-b; 1: the same order.")
    first = [r for r in result.rankings if (r.text, r.draw) == _first(result)]
    plots = [
        Figure(
            f"Importance of {result.unit}s by metric",
            "Of each metric as a share of its largest value; the lowest would be removed first.",
            " ".join(depth_findings(result)),
            partial(figures.importances, first, [r.metric for r in first], result.unit),
        )
    ]
    same = [r for r in result.rankings if r.metric == result.rankings[0].metric]
    if len(same) > 1:
        plots.append(
            Figure(
                f"Importance of {result.unit}s by text",
                f"By {same[0].metric}, as a share of the largest value.",
                " ".join(_texts(result) + _draws(result)),
                partial(
                    figures.importances, same, [_set_name(r, result) for r in same], result.unit
                ),
            )
        )
    sentences = [
        "Ranked on text, never on items of a task: judging by a test split would leak it into what "
        "is removed."
    ]
    tables = [ranks, agreement] if pairs else [ranks]
    return Section(TITLE, sentences, tables, plots)


def _metrics(result: DepthResult, first: Sequence[Ranking]) -> list[str]:
    pairs = [(result.tau(a, b), a, b) for a, b in itertools.combinations(first, 2)]
    known = [pair for pair in pairs if not math.isnan(pair[0])]
    if not known:
        return []
    low, a, b = min(known, key=lambda pair: pair[0])
    high, c, d = max(known, key=lambda pair: pair[0])
    if low >= AGREE:
        return [
            f"all metrics agree: the least alike are {a.metric} and {b.metric} (tau {low:.2f})."
        ]
    word = "disagree" if low < DISAGREE else "agree in part"
    text = f"metrics {word}: {a.metric} and {b.metric} are least alike (tau {low:.2f})"
    if len(known) > 1:
        text += f", {c.metric} and {d.metric} most (tau {high:.2f})"
    return [f"{text}."]


def _texts(result: DepthResult) -> list[str]:
    found = []
    metrics = list(dict.fromkeys(r.metric for r in result.rankings))
    texts = list(dict.fromkeys(r.text for r in result.rankings))
    for metric in metrics:
        for one, other in itertools.combinations(texts, 2):
            tau = _mean_tau(result, metric, one, other)
            if tau is not None:
                where = f"rankings by {metric} on {one} and on {other}"
                found.append(f"{where} {_agreement(tau)} (tau {tau:.2f}).")
    return found


def _draws(result: DepthResult) -> list[str]:
    found = []
    texts = list(dict.fromkeys(r.text for r in result.rankings))
    for metric in dict.fromkeys(r.metric for r in result.rankings):
        taus = [_mean_tau(result, metric, text, text) for text in texts]
        known = [tau for tau in taus if tau is not None]
        if known:
            lowest = min(known)
            found.append(
                f"two draws of one text give rankings by {metric} that {_agreement(lowest)} (tau "
                f"{lowest:.2f}): no two texts can be told apart better than that."
            )
    return found


def _harmless(result: DepthResult, first: Sequence[Ranking]) -> list[str]:
    """Return the sentence on parts without which the loss is not higher."""
    for ranking in first:
        useless = [i for i, value in enumerate(ranking.values) if value <= 0]
        if ranking.metric == "loss" and useless:
            return [
                f"the loss on {ranking.text} is no higher without {result.unit} "
                f"{_numbers(useless)}, one at a time."
            ]
    return []


def _mean_tau(result: DepthResult, metric: str, one: str, other: str) -> float | None:
    """Return the mean tau of rankings of two texts, or of different draws of one."""
    first = [r for r in result.rankings if (r.metric, r.text) == (metric, one)]
    second = [r for r in result.rankings if (r.metric, r.text) == (metric, other)]
    pairs = [(a, b) for a in first for b in second if one != other or a.draw < b.draw]
    taus = [tau for tau in (result.tau(a, b) for a, b in pairs) if not math.isnan(tau)]
    return sum(taus) / len(taus) if taus else None


def _agreement(tau: float) -> str:
    if tau >= AGREE:
        return "agree"
    return "disagree" if tau < DISAGREE else "agree in part"


def _first(result: DepthResult) -> tuple[str, int]:
    return result.rankings[0].text, result.rankings[0].draw


def _set_name(ranking: Ranking, result: DepthResult) -> str:
    several = any(r.draw != result.rankings[0].draw for r in result.rankings)
    return f"{ranking.text}, draw {ranking.draw + 1}" if several else ranking.text


def _name(ranking: Ranking, result: DepthResult) -> str:
    several = any((r.text, r.draw) != _first(result) for r in result.rankings)
    return f"{ranking.metric}, {_set_name(ranking, result)}" if several else ranking.metric


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _numbers(parts: Sequence[int]) -> str:
    return ", ".join(map(str, parts))
