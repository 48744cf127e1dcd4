"""What a diagnosis found, in sentences that name things."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_calib_plugin.diagnostics.layers import reasons
from lm_calib_plugin.diagnostics.layers.depths import FIRST_TOKENS, Propagation
from lm_calib_plugin.diagnostics.layers.diagnosis import Diagnosis
from lm_calib_plugin.diagnostics.layers.evidence import HELDOUT, TEXT, Layer
from lm_calib_plugin.diagnostics.tokens import LN2, TokenDivergence

# What sentences name; tables have more.
NAMED = 3
# A group that has this many times its even share is where the error arises.
ABOVE_EVEN = 1.5
# Errors that end within a quarter of their sum just add up.
ADDS_UP = 1.25
ON = {TEXT: "on the text", HELDOUT: "on sequences held out", "calibration": "on calibration"}


@dataclass(frozen=True)
class Group:
    """Layers of one kind or one block: their mean errors, and their part of the sum of all."""

    name: Any
    count: int
    means: Mapping[str, float | None]
    share: float | None


def groups(found: Diagnosis, by: Callable[[Layer], Any]) -> list[Group]:
    """Return layers in groups, in order of appearance."""
    members: dict[Any, list[Layer]] = {}
    for layer in found.layers:
        members.setdefault(by(layer), []).append(layer)
    total = sum(layer.errors[found.basis] or 0.0 for layer in found.layers)
    return [
        Group(
            name,
            len(own),
            {kind: _mean(layer.errors[kind] for layer in own) for kind in ON},
            sum(x.errors[found.basis] or 0.0 for x in own) / total if total > 0 else None,
        )
        for name, own in members.items()
    ]


def findings(found: Diagnosis) -> list[str]:
    """Return what was found, the most important first."""
    said = [*_structure(found), *_where(found)]
    if found.propagation is not None:
        said += _travel(found.propagation)
    said += [*_worst(found), *_over_fit(found), *_starved(found)]
    if found.propagation is not None:
        said += _predictions(found.propagation)
    if found.unlike:
        said.append(
            f"{len(found.unlike)} layers were scaled before they were rounded: their errors are "
            "those of the report, and their weights are not compared."
        )
    said += [f"Note: {note}." for note in (found.opened.notes if found.opened else [])]
    if found.opened is None:
        said.append("Only the report was read: how errors travel takes both models.")
    return said


def _structure(found: Diagnosis) -> Iterator[str]:
    """Yield what was taken out of the model."""
    structure = found.run.structure
    if structure is None:
        return
    removed = structure.get("removed")
    names = [str(name) for name in removed] if isinstance(removed, list) else []
    error = structure.get("error")
    told = error if isinstance(error, dict) else {}
    known = [f"{told[k]:.3g} {ON[k]}" for k in ("calibration", "heldout") if _number(told.get(k))]
    more = f"; relative error of the last hidden states: {', '.join(known)}" if known else ""
    shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    count = f"{len(names)} parts were" if len(names) != 1 else "1 part was"
    yield f"{count} taken out ({shown}): no layer has an error of its own{more}."


def _where(found: Diagnosis) -> Iterator[str]:
    """Yield where the error arises."""
    known = [e for e in (x.errors[found.basis] for x in found.layers) if e is not None]
    if not known:
        if found.layers:
            yield "The report has no error of any layer: nothing was calibrated on data."
        return
    if not any(known):
        yield f"No layer has any error {ON[found.basis]}: nothing was changed."
        return
    kinds = sorted(groups(found, lambda layer: layer.kind), key=lambda g: -(g.share or 0.0))
    blocks = [g for g in groups(found, lambda layer: layer.block) if g.name is not None]
    blocks.sort(key=lambda g: -(g.share or 0.0))
    median = f"median of all layers {statistics.median(known):.3g}"
    top = kinds[0]
    even = top.count / len(found.layers)
    share = top.share or 0.0
    if share >= ABOVE_EVEN * even:
        yield (
            f"The error arises mostly in {top.name} layers: {share:.0%} of the sum of relative "
            f"errors {ON[found.basis]} in {even:.0%} of the layers (mean "
            f"{_shown(top.means[found.basis])}, {median})."
        )
    else:
        yield (
            f"The error is spread over all kinds of layers: {top.name} has most, {share:.0%} "
            f"of the sum of relative errors {ON[found.basis]} in {even:.0%} of the layers "
            f"({median})."
        )
    yield from _by_inputs(found)
    if len(blocks) > 1:
        yield (
            f"By depth: block {blocks[0].name} has most of it, {blocks[0].share or 0:.0%} (mean "
            f"{_shown(blocks[0].means[found.basis])}), block {blocks[-1].name} least, "
            f"{blocks[-1].share or 0:.0%}."
        )


def _by_inputs(found: Diagnosis) -> Iterator[str]:
    """Yield whether rounded weights or rounded inputs make the error, where both are rounded."""
    texts = [x.text for x in found.layers if x.text is not None]
    pairs = [(x.error, x.of_inputs) for x in texts]
    known = [(weights, inputs) for weights, inputs in pairs if inputs is not None]
    if not known:
        return
    weights = statistics.fmean(weights or 0.0 for weights, _ in known)
    inputs = statistics.fmean(inputs for _, inputs in known)
    which = "the inputs" if inputs > weights else "the weights"
    yield (
        f"Rounding {which} makes most of it: by itself rounding the inputs costs {inputs:.3g} on "
        f"average, what was done to the weights {weights:.3g}."
    )


def _travel(found: Propagation) -> Iterator[str]:
    """Yield how the error travels."""
    if not found.aligned:
        yield (
            f"Blocks were taken out, so that only ends are compared: relative error of the last "
            f"hidden states {found.curve('free')[-1]:.3g}."
        )
        return
    free, local = found.curve("free"), found.curve("local")
    if not any(free):
        yield "The hidden states of both models are the same to the last bit behind every block."
        return
    first = next(i for i, e in enumerate(free) if e > 0)
    last = len(free) - 1
    steps = [(free[i] / free[i - 1], i) for i in range(first + 1, len(free))]
    if steps:
        ratio = free[last] / free[first]
        step, place = max(steps)
        how = f"grows {ratio:.1f} times" if ratio >= 1 else f"falls to {ratio:.0%}"
        most = f", most from block {place - 1} to {place} (x {step:.1f})" if step > 1 else ""
        yield (
            f"The error of the hidden states {how} from block {first} ({free[first]:.3g}) to block "
            f"{last} ({free[last]:.3g}){most}."
        )
    place = max(range(len(local)), key=local.__getitem__)
    yield (
        f"Fed with dense hidden states, block {place} errs most by itself ({local[place]:.3g}, "
        f"median of all {statistics.median(local):.3g})."
    )
    piled = found.amplification()
    if piled is not None:
        said = "they just add up"
        if piled > ADDS_UP:
            said = "errors of early blocks are made larger by later ones"
        elif piled < 1 / ADDS_UP:
            said = "later blocks make up for part of them"
        yield (
            f"At the end the error is {piled:.2g} times the sum of what the blocks err by "
            f"themselves: {said}."
        )
    hidden = found.first_tokens()
    if hidden is not None and hidden[1] >= FIRST_TOKENS:
        place, times = hidden
        rest = found.curve("free", rest=True)
        yield (
            f"First tokens hide much of it: the dense states of the first token of a sequence are "
            f"so large that behind block {place} the error without them is {rest[place]:.3g}, and "
            f"not {free[place]:.3g} ({times:.1f} times; behind the last block {rest[last]:.3g} "
            f"and {free[last]:.3g})."
        )


def _worst(found: Diagnosis) -> Iterator[str]:
    """Yield the worst layers, each with its reasons."""
    for number, (layer, why) in enumerate(found.worst[:NAMED]):
        error = layer.errors[found.basis]
        if error:
            head = "Worst" if not number else f"Number {number + 1}"
            yield f"{head}: {layer.name} (error {error:.3g}): {reasons.in_words(why)}."


def _over_fit(found: Diagnosis) -> Iterator[str]:
    """Yield which layers are over-fitted to the calibration set."""
    over = found.over_fitted
    if over:
        shown = [f"{x.name} ({ratio:.1f} times {ON[on]})" for x, on, ratio in over[:NAMED]]
        more = f" and {len(over) - NAMED} more" if len(over) > NAMED else ""
        yield (
            f"Over-fitted to the calibration set (error at least {reasons.OVER_FIT:g} times as "
            f"large elsewhere): {len(over)} of {len(found.layers)} layers, {', '.join(shown)}"
            f"{more}."
        )
        return
    known = [x for x in found.layers if x.over_fit()]
    ratios = [(r, x.name) for x in known for r in reasons.felt(x).values()]
    if ratios:
        ratio, name = max(ratios)
        yield (
            "No layer is over-fitted to the calibration set: elsewhere its error is at most "
            f"{ratio:.1f} times as large ({name})."
        )
    elif known:
        yield (
            "No layer is over-fitted to the calibration set: errors of the weights are below "
            f"{reasons.FELT:g} of the outputs everywhere."
        )


def _starved(found: Diagnosis) -> Iterator[str]:
    """Yield which layers saw few tokens, or none."""
    few = found.starved
    dead = [x for x in few if x.row.tokens == 0]
    if dead:
        unseen = [x for x in dead if x.text is not None and x.text.seen.tokens == 0]
        also = ""
        if dead and len(unseen) == len(dead):
            also = "; none of the text does either"
        yield (
            f"No calibration token reaches {_listed([x.name for x in dead])}: dead, or not used by "
            f"this calibration set{also}."
        )
    short = [x for x in few if x.row.tokens]
    if short:
        least = short[0]
        yield (
            f"{len(short)} layers saw fewer tokens than they have inputs: "
            f"{_listed([x.name for x in short])} (least: {least.row.tokens} for "
            f"{least.row.shape[1]} inputs)."
        )


def _predictions(found: Propagation) -> Iterator[str]:
    """Yield what becomes of the logits."""
    every = TokenDivergence.joined(found.tokens)
    if not len(every):
        return
    yield (
        f"Logits: relative error {found.logit_error():.3g}, JS {float(every.js.mean()):.3g} nats "
        f"(at most {LN2:.3f}), KL {float(every.kl.mean()):.3g} nats, "
        f"{float(every.flipped.mean()):.1%} of the most likely tokens flip, perplexity "
        f"{float(every.nll_dense.mean().exp()):.4g} becomes "
        f"{float(every.nll_compressed.mean().exp()):.4g}."
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"
