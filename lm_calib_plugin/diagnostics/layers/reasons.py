"""Why a layer is bad: rules with numbers, each of which may hold or not.

Thresholds are set so that a rule is silent on layers of ordinary models: where a normal
distribution says what is ordinary it is named, else they are round numbers well beyond what
SmolLM2-135M shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lm_calib_plugin.diagnostics.layers.evidence import HELDOUT, TEXT, Layer, Weights
from lm_calib_plugin.drawing.words import one_line
from lm_calib_plugin.report import WIDENED, from_first_token

NONE = "no single reason found"
# Held-out errors of the report come from up to 512 tokens: the ratio of two such errors of one
# source scatters by a third. Twice is beyond that.
OVER_FIT = 2.0
# A part in a thousand of the output is below what rounding to 16 bits does to some layers.
FELT = 1e-3
# A part of the error energy that a single cause has to carry to be the reason.
CARRIED = 0.25
# The largest of 4,096 normal channels is less than 1.5 times the median of all; LLM.int8 calls 6
# (absolute, of inputs of about 1) an outlier.
OUTLIER = 10.0
# Energy of a channel on calibration over that on the text, below which it was hardly seen.
QUIET = 0.01
# The largest of 10,000 normal weights is 3.9 times their root mean square.
PEAK = 10.0
# Rounding to a step of s times the root mean square costs s^2 / 12 of the energy of the weights:
# 3 % here, what three bits do and four do not.
COARSE = 0.6
CLIPPED = 0.01  # share of weights, or of input values, that grids and ranges cut off
STRONGER = 0.1  # fraction removed beyond the median of all layers
WEAKER_DAMP = 10.0  # times a ridge had to be raised


@dataclass(frozen=True)
class Reason:
    """Why a layer is bad: a short name of the rule, and what it found in words."""

    rule: str
    words: str


@dataclass(frozen=True)
class Case:
    """A layer, its weights where they are at hand, and what is usual in its model.

    ``asked_damp`` is the ridge that the recipe asks for, ``usual_removed`` and ``usual_bits`` the
    medians over all layers.
    """

    layer: Layer
    weights: Weights | None = None
    asked_damp: float | None = None
    usual_removed: float = 0.0
    usual_bits: float | None = None


def reasons(case: Case) -> list[Reason]:
    """Return every reason that holds, those that say most first; none where no rule holds."""
    return [found for rule in RULES for found in [rule(case)] if found is not None]


def in_words(found: Sequence[Reason]) -> str:
    """Return reasons as a sentence without its full stop."""
    return "; ".join(reason.words for reason in found) or NONE


def dead_columns(case: Case) -> Reason | None:
    """Input channels that calibration never showed, or whose weights are all gone."""
    text, calibration = case.layer.text, case.layer.calibration
    if text is None or case.weights is None or not text.seen.tokens:
        return None
    error = case.weights.error_by_input(text.seen.mean_square)
    total = float(error.sum())
    if not total > 0:
        return None
    if calibration is not None and calibration.seen.tokens:
        seen, now = calibration.seen.mean_square, text.seen.mean_square
        never = (calibration.seen.active == 0) & (now > 0)
        hardly = (seen < QUIET * now) & ~never
        quiet = never | hardly
        share = float(error[quiet].sum()) / total
        if bool(quiet.any()) and share >= CARRIED:
            return Reason(
                "dead columns",
                f"{_channels(quiet)}, never or hardly active on calibration but active on the "
                f"text, {_carry(quiet)} {share:.0%} of the error",
            )
    emptied = case.weights.emptied()
    share = float(error[emptied].sum()) / total
    if bool(emptied.any()) and share >= CARRIED:
        return Reason(
            "dead columns",
            f"{_channels(emptied)} lost all weights and {_carry(emptied)} {share:.0%} of the error",
        )
    return None


def outlier_channel(case: Case) -> Reason | None:
    """One input channel far larger than the others, to which the error is due."""
    text = case.layer.text
    if text is None or not text.seen.tokens:
        return None
    amax = text.seen.amax.double()
    channel, usual = int(amax.argmax()), float(amax.median())
    ratio = float(amax[channel]) / usual if usual > 0 else 0.0
    if ratio < OUTLIER:
        return None
    energy = text.seen.mean_square
    held = float(energy[channel] / energy.sum())
    head = f"input channel {channel} is {ratio:.0f} times the median channel"
    said = [f"{held:.0%} of the input energy"] if held >= 0.01 else []
    blamed, tail = False, ""
    if case.weights is not None:
        error = case.weights.error_by_input(energy)
        share = float(error[channel] / error.sum()) if float(error.sum()) > 0 else 0.0
        blamed = share >= CARRIED
        said += [f"{share:.0%} of the error of the weights"] if blamed else []
    rounded, both = text.of_inputs, text.total
    if rounded is not None and both and rounded >= 0.5 * both:
        blamed = True
        tail = f"; rounding the inputs makes {min(1.0, rounded / both):.0%} of the error"
    carried = f" and carries {' and '.join(said)}" if said else ""
    return Reason("outlier channel", head + carried + tail) if blamed else None


def few_tokens(case: Case) -> Reason | None:
    """Fewer tokens than inputs: statistics that a solver can not trust."""
    row = case.layer.row
    if row.tokens is None:
        return None
    width = row.shape[1]
    if row.tokens == 0:
        return Reason("few tokens", "no calibration token reached it: it was compressed blindly")
    if row.borrowed:
        return Reason(
            "few tokens",
            f"it saw {row.tokens} tokens for {width} inputs and borrowed {row.borrowed} of its "
            "fellow experts",
        )
    if row.tokens < width:
        return Reason("few tokens", f"{row.tokens} calibration tokens for {width} inputs")
    return None


def coarse_grid(case: Case) -> Reason | None:
    """Steps of the grid that are large beside the weights: of all, or of groups with a peak."""
    row, weights = case.layer.row, case.weights
    if row.bits is None:
        return None
    if weights is not None:
        energy = torch.ones(weights.dense.shape[1], dtype=torch.float64)
        if case.layer.text is not None and case.layer.text.seen.tokens:
            energy = case.layer.text.seen.mean_square
        error, peaks = weights.error_by_group(energy), weights.peaks()
        total, stretched = float(error.sum()), peaks >= PEAK
        share = float(error[stretched].sum()) / total if total > 0 else 0.0
        if share >= CARRIED:
            place = int(torch.where(stretched, error, -1.0).argmax())
            out, group = divmod(place, peaks.shape[1])
            where = f"row {out}" + (f", group {group}" if peaks.shape[1] > 1 else "")
            return Reason(
                "coarse grid",
                f"one weight of {where} is {float(peaks[out, group]):.0f} times its neighbors and "
                f"stretches their grid: {share:.0%} of the error lies in {int(stretched.sum())} "
                f"such groups of {peaks.numel()}",
            )
        rms = float(weights.dense.double().square().mean().sqrt())
        step = row.scale_median / rms if row.scale_median is not None and rms > 0 else 0.0
        if step >= COARSE:
            return Reason(
                "coarse grid",
                f"a step of its {row.bits}-bit grid is {step:.2g} times a typical weight, which "
                f"costs {step**2 / 12:.0%} of the energy of the weights by itself",
            )
    if row.clipped is not None and row.clipped >= CLIPPED:
        return Reason("coarse grid", f"{row.clipped:.1%} of the weights lie beyond the grid")
    return None


def strength(case: Case) -> Reason | None:
    """More was taken from this layer than from others."""
    row = case.layer.row
    if row.bits is not None:
        if case.usual_bits is not None and row.bits < case.usual_bits:
            return Reason("strength", f"it has {row.bits} bits, others {case.usual_bits:g}")
        return None
    if row.removed >= case.usual_removed + STRONGER:
        return Reason(
            "strength",
            f"{row.removed:.0%} of it was removed, of others {case.usual_removed:.0%}",
        )
    return None


def static_range(case: Case) -> Reason | None:
    """A calibrated range of inputs that rests on first tokens, or that cuts the text off."""
    row, text = case.layer.row, case.layer.text
    if row.input_limit is None:
        return None
    if from_first_token(row):
        assert row.input_limit_rest is not None
        return Reason(
            "static range",
            f"the range of its inputs ({row.input_limit:.3g}) is that of first tokens: without "
            f"them it were {row.input_limit_rest:.3g} (limit {WIDENED:g} times)",
        )
    if text is not None and text.values and text.beyond >= CLIPPED * text.values:
        return Reason(
            "static range",
            f"{text.beyond / text.values:.1%} of its inputs on the text lie beyond the calibrated "
            f"range ({row.input_limit:.3g})",
        )
    return None


def over_fit(case: Case) -> Reason | None:
    """An error that is much larger on other data than on the calibration set."""
    found = over_fitted(case.layer)
    if found is None:
        return None
    what, ratio = found
    said = {HELDOUT: "on sequences held out", TEXT: "on the text"}[what]
    few = ""
    row = case.layer.row
    if row.tokens is not None and row.tokens < 10 * row.shape[1]:
        few = f" ({row.tokens} tokens for {row.shape[1]} inputs)"
    damp = ""
    if row.damp is not None and row.damp < 1e-3:
        damp = f", with a ridge of only {row.damp:g}"
    return Reason(
        "over-fitted",
        f"over-fitted to its calibration set{few}{damp}: its error {said} is {ratio:.1f} times as "
        "large",
    )


def ill_conditioned(case: Case) -> Reason | None:
    """A Gram matrix that could not be factored as asked."""
    damp, asked = case.layer.row.damp, case.asked_damp
    if damp is None or asked is None or asked <= 0 or damp < WEAKER_DAMP * asked:
        return None
    return Reason(
        "ill-conditioned", f"its Gram matrix needed a ridge of {damp:g} instead of {asked:g}"
    )


def fell_back(case: Case) -> Reason | None:
    """Something else was done than asked."""
    how = case.layer.row.fallback
    return Reason("fallback", f"it fell back to {one_line(how)}") if how else None


RULES: tuple[Callable[[Case], Reason | None], ...] = (
    few_tokens, over_fit, dead_columns, outlier_channel, coarse_grid, static_range, strength,
    fell_back, ill_conditioned,
)  # fmt: skip


def over_fitted(layer: Layer) -> tuple[str, float] | None:
    """Return on what, and how many times, the error is larger than on the calibration set.

    None where it is less than twice, or too small to be felt.
    """
    found = {name: ratio for name, ratio in felt(layer).items() if ratio >= OVER_FIT}
    if not found:
        return None
    name = max(found, key=lambda n: found[n])
    return name, found[name]


def felt(layer: Layer) -> dict[str, float]:
    """Return how many times larger errors are than on calibration, where they can be felt."""
    errors = {HELDOUT: layer.row.error_heldout, TEXT: layer.text and layer.text.error}
    return {n: ratio for n, ratio in layer.over_fit().items() if (errors[n] or 0.0) >= FELT}


def case_of(
    layer: Layer,
    layers: Sequence[Layer],
    weights: Weights | None = None,
    asked_damp: float | None = None,
) -> Case:
    """Return a layer with what is usual among all layers."""
    bits = [x.row.bits for x in layers if x.row.bits is not None]
    return Case(
        layer,
        weights,
        asked_damp,
        statistics.median(x.row.removed for x in layers),
        statistics.median(bits) if bits else None,
    )


def _channels(which: torch.Tensor) -> str:
    numbers = which.nonzero().flatten().tolist()
    if len(numbers) == 1:
        return f"input channel {numbers[0]}"
    shown = ", ".join(map(str, numbers[:3]))
    return f"{len(numbers)} input channels ({shown}{', ...' if len(numbers) > 3 else ''})"


def _carry(which: torch.Tensor) -> str:
    return "carry" if int(which.sum()) > 1 else "carries"
