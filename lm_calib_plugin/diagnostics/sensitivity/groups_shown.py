"""What the groups do, in words, tables and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lm_calib_plugin.diagnostics.document import Figure, Section, Table
from lm_calib_plugin.diagnostics.sensitivity import figures
from lm_calib_plugin.diagnostics.sensitivity.groups import GroupRow, GroupsResult
from lm_calib_plugin.diagnostics.sensitivity.judge import nats
from lm_calib_plugin.diagnostics.sensitivity.parts import BLOCK, COMPONENT, END, HALF
from lm_calib_plugin.diagnostics.sensitivity.variants import EXCHANGED
from lm_calib_plugin.recipe import Recipe

_HEAD = (
    "part", "is", "layers", "weights", "ppl without", "recovers", "from", "to", "ppl alone",
    "alone, nats", "from", "to", "damage",
)  # fmt: skip
_ROUNDING = 1e-3
# Sum of the damages of all parts, as a share of the whole, between which they add up.
_ADDS_UP = (0.9, 1.1)
# How many times more of the loss than of the weights a part has to recover to be named for it.
_STANDS_OUT = 2.0
_CAPTION = (
    "weights: share of what is compressed. ppl without: perplexity with all but the part "
    "compressed. recovers: share of the loss that goes when the part stays dense, 95 % interval "
    "over sequences. ppl alone: with only the part compressed; alone: how far the negative "
    "log-likelihood then rises, nats per token. damage: that as a share of the whole loss."
)


def groups_findings(result: GroupsResult) -> list[str]:
    """Return what was found, the answer first."""
    judge = result.judge
    whole = (
        f"compressing everything changes the negative log-likelihood by {nats(result.increase)} "
        f"per token (perplexity {judge.perplexity(result.dense):.4g} to "
        f"{judge.perplexity(result.everything):.4g})"
    )
    if not result.resolved:
        return [
            f"{whole}: not told from 0, so that no part of the model can be blamed for it; give "
            "more text (--text-samples), or compress harder."
        ]
    found = [f"{whole}."]
    components = _ranked(result, COMPONENT)
    if components:
        found.append(_costliest(components, result))
        found += _densest(components)
    halves = _ranked(result, HALF)
    if len(halves) == 2:
        first, second = halves
        found.append(
            f"leaving all of {first.group.name} dense recovers {first.recovery.words()}, all of "
            f"{second.group.name} {second.recovery.words()} ({_percent(first.weights)} and "
            f"{_percent(second.weights)} of the weights)."
        )
    for row in _ranked(result, END):
        found.append(
            f"leaving the {row.group.name} dense ({_percent(row.weights)} of the weights) recovers "
            f"{row.recovery.words()}."
        )
    found += _of_blocks(result)
    for kind in (COMPONENT, BLOCK):
        found += _sum_of(result, kind)
    return found


def groups_section(result: GroupsResult, recipe: Recipe, title: str) -> Section:
    """Return the evidence: a table of all groups, and a plot."""
    sentences = [f"Variants: {result.how}."]
    if result.how == EXCHANGED and recipe.needs_data and recipe.propagate == "compressed":
        sentences.append(
            "The run calibrated each block with what the compressed blocks before it produce: one "
            "that leaves a part dense from the start could find other weights behind it "
            "(--recompress does that)."
        )
    if result.how != EXCHANGED and recipe.make_method().kv_bits is not None:
        sentences.append("Cached keys and values are rounded in every variant but the dense model.")
    ordered = sorted(result.rows, key=_order)
    rows = [_row(row, result) for row in ordered]
    plots = []
    if result.resolved:
        shown = [row for row in result.rows if row.group.kind == BLOCK] or ordered
        plots.append(
            Figure(
                f"{title}: who carries the loss",
                "Right: more of the loss goes when only this part stays dense (dot), or is made by "
                "this part alone (square). Bars: 95 % intervals over sequences.",
                "; ".join(f"{r.group.name} recovers {r.recovery.words()}" for r in shown) + ".",
                partial(figures.shares, shown, title),
            )
        )
    return Section(title, sentences, [Table(_HEAD, rows, _CAPTION, shown=24)], plots)


def _costliest(rows: Sequence[GroupRow], result: GroupsResult) -> str:
    """Return the sentence on the component whose dense form helps most, and the next one."""
    first = rows[0]
    text = (
        f"leaving {first.group.name} dense ({len(first.group.layers)} layers, "
        f"{_percent(first.weights)} of the weights) recovers {first.recovery.words()} of the loss"
    )
    if len(rows) > 1:
        second = rows[1]
        gap = result.judge.increase(second.without, first.without)
        text += f"; {second.group.name} comes next with {second.recovery.words()}"
        text += "" if gap.excludes_zero else ", not told apart from it on this text"
    least = rows[-1]
    if len(rows) > 2:
        text += f"; {least.group.name} matters least with {least.recovery.words()}"
    return f"{text}."


def _densest(rows: Sequence[GroupRow]) -> list[str]:
    """Return the sentence on the component that recovers most for its size, if one stands out."""
    best = max(rows, key=lambda row: (row.recovery.value or 0.0) / row.weights)
    value, low = best.recovery.value, best.recovery.low
    if value is None or low is None or low < _STANDS_OUT * best.weights:
        return []
    return [
        f"for its size {best.group.name} is worth most: {best.recovery.words()} of the loss for "
        f"{_percent(best.weights)} of the weights."
    ]


def _of_blocks(result: GroupsResult) -> list[str]:
    rows = [row for row in result.rows if row.group.kind == BLOCK]
    if not rows:
        return []
    worst = sorted(rows, key=lambda r: -r.increase_alone.value)[:2]
    even = 1 / len(rows)
    found = [
        f"{_and([row.group.name for row in worst])} cost most by themselves: "
        f"{_and([nats(row.increase_alone) for row in worst])}, "
        f"{_and([_percent(row.damage.value or 0.0) for row in worst])} of the loss, where an even "
        f"share were {_percent(even)}."
    ]
    best = max(rows, key=lambda r: r.recovery.value or 0.0)
    found.append(f"leaving {best.group.name} dense recovers most: {best.recovery.words()}.")
    harmless = [row for row in rows if row.increase_alone.low <= 0]
    if harmless and len(harmless) < len(rows):
        found.append(
            f"{len(harmless)} of {len(rows)} blocks can be compressed alone without a loss that "
            "this text resolves."
        )
    return found


def _sum_of(result: GroupsResult, kind: str) -> list[str]:
    """Return whether damages add up, where the groups of a kind are everything together."""
    rows = [row for row in result.rows if row.group.kind == kind]
    if sum(row.weights for row in rows) < 1 - _ROUNDING:
        return []
    damage = sum(row.damage.value or 0.0 for row in rows)
    meaning = "their damages add up"
    if damage < _ADDS_UP[0]:
        meaning = "together they do more than each alone"
    elif damage > _ADDS_UP[1]:
        meaning = "one makes up for another"
    return [
        f"compressed one at a time, the {kind}s do {_percent(damage)} of the whole damage in sum: "
        f"{meaning}."
    ]


def _ranked(result: GroupsResult, kind: str) -> list[GroupRow]:
    own = [row for row in result.rows if row.group.kind == kind]
    return sorted(own, key=lambda row: -(row.recovery.value or 0.0))


def _order(row: GroupRow) -> tuple[int, float]:
    kinds = (COMPONENT, HALF, END, BLOCK)
    return kinds.index(row.group.kind), -(row.recovery.value or 0.0)


def _row(row: GroupRow, result: GroupsResult) -> tuple[object, ...]:
    judge, recovery, alone = result.judge, row.recovery, row.increase_alone
    return (
        row.group.name,
        row.group.role or row.group.kind,
        len(row.group.layers),
        row.weights,
        judge.perplexity(row.without),
        recovery.value,
        recovery.low,
        recovery.high,
        judge.perplexity(row.alone),
        alone.value,
        alone.low,
        alone.high,
        row.damage.value,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _and(words: Sequence[str]) -> str:
    return " and ".join(words)
