"""What noise does, in words, a table and a plot."""

from __future__ import annotations

from functools import partial

from lm_calib_plugin.diagnostics.document import Figure, Section, Table
from lm_calib_plugin.diagnostics.sensitivity import figures
from lm_calib_plugin.diagnostics.sensitivity.curves import BROKEN, where_not
from lm_calib_plugin.diagnostics.sensitivity.judge import nats
from lm_calib_plugin.diagnostics.sensitivity.noise import Curve, NoiseResult, spread
from lm_calib_plugin.diagnostics.sensitivity.options import ALIGNED, WEIGHTS

TITLE = "Noise of stated size"
_NAMES = {
    "gaussian": "Gaussian noise",
    "uniform": "uniform noise",
    "aligned": "noise with the signs of the rounding error",
}
_HEAD = ("noise", "size", "as stored", "NLL rises, nats", "from", "to", "sd of seeds")
_CAPTION = (
    "size: Frobenius norm of the noise over that of the weight, for each layer (inputs: 2-norm of "
    "each token). as stored: after the cast to the dtype of the model. 95 % interval over seeds "
    "and sequences."
)
# Relative; how far the cast to the dtype of the model may move the size before it is said.
_MOVED = 0.05


def noise_findings(result: NoiseResult) -> list[str]:
    """Return what was found, the answer first."""
    found = []
    for curve in result.curves:
        like = _like_recipe(curve, result)
        found += [like] if like else []
    for curve in result.curves:
        name = _NAMES[curve.kind]
        where = f"{result.rise:g} nats are lost to {name} on {result.place} of relative size "
        if curve.at_rise is None:
            where += where_not(curve.points, result.rise)
        else:
            where += f"{curve.at_rise:.3g}"
        slope = curve.slope
        if slope is None:
            where += "; fewer than two sizes give a loss that is resolved and below 1 nat"
        else:
            where += (
                f"; the loss grows with the size to the power of {slope.value:.2f} between "
                f"{slope.first:.3g} and {slope.last:.3g}"
            )
        found.append(f"{where}.")
    return found


def noise_section(result: NoiseResult) -> Section:
    """Return the evidence: all points, and the curves with the recipe between them."""
    places = result.place if result.place == WEIGHTS else "inputs"
    sentences = [
        f"Noise on {places} of {len(result.layers)} layers, each by its own size; slopes are "
        f"fitted where the loss is told from 0 and at most {BROKEN:g} nat."
    ]
    if result.no_actual is not None:
        sentences.append(f"No error of the recipe stands beside it: {result.no_actual}.")
    moved = [p for c in result.curves for p in c.points if abs(p.stored / p.size - 1) > _MOVED]
    if moved:
        sentences.append(
            f"The dtype of the model moves {len(moved)} of these sizes by more than "
            f"{100 * _MOVED:.0f} % when noisy weights are stored; --dtype float32 would not."
        )
    if any(not p.finite for c in result.curves for p in c.points):
        sentences.append("Where nothing is said, the logits were no numbers any more.")
    rows = [
        (
            c.kind,
            p.size,
            p.stored,
            *((p.value, p.low, p.high) if p.finite else (None,) * 3),
            spread(p),
        )
        for c in result.curves
        for p in c.points
    ]
    if result.actual is not None:
        gap = result.actual.increase
        rows.append(("the recipe", result.actual.size, None, gap.value, gap.low, gap.high, None))
    figure = Figure(
        TITLE,
        "Both axes are logarithmic: a straight line is a power law. Losses that are not above 0 "
        "are left out. The star is the error that the recipe makes.",
        " ".join(noise_findings(result)),
        partial(figures.curves, result),
    )
    return Section(TITLE, sentences, [Table(_HEAD, rows, _CAPTION, shown=40)], [figure])


def _like_recipe(curve: Curve, result: NoiseResult) -> str:
    """Return the sentence that compares the recipe with one kind of noise, or nothing."""
    actual = result.actual
    if actual is None or result.place != WEIGHTS:
        return ""
    start = f"the recipe's weight error of {actual.size:.3g} costs {nats(actual.increase)}"
    name = _NAMES[curve.kind]
    if not actual.increase.excludes_zero:
        return f"{start}: not told from 0, so that no size of {name} is like it."
    if actual.increase.value < 0:
        return f"{start}: less than nothing, which no noise does."
    if curve.like_recipe is None:
        return f"{start}: as much as {name} {where_not(curve.points, actual.increase.value)}."
    ratio = curve.like_recipe / actual.size
    if curve.kind == ALIGNED:
        meaning = "with its signs, other sizes of single errors do as much harm"
    else:
        meaning = "the model takes it like noise of no direction"
    if ratio < 1 / 1.15:
        meaning = "it does more harm than its size says"
    elif ratio > 1.15:
        meaning = "it does less harm than its size says"
    return f"{start}: as harmful as {name} of {curve.like_recipe:.3g}; {meaning}."
