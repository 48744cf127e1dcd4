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
    "gaussian": "Gaussian noise of {}",
    "uniform": "uniform noise of {}",
    "aligned": "noise of {} with the signs of the recipe's error",
}
_HEAD = ("noise", "size", "as stored", "NLL rises, nats", "from", "to", "sd of seeds")
_CAPTION = (
    "size: Frobenius norm of the noise over that of the weight, for each layer (inputs: 2-norm of "
    "each token). as stored: after the cast to the dtype of the model. NLL: mean over seeds, with "
    "a 95 % interval over sequences for the noise that was drawn. Every two seeds are one noise "
    "with both signs (not aligned noise), so that what is linear in it cancels in the mean; sd of "
    "seeds shows it."
)
# Relative; how far the cast to the dtype of the model may move the size before it is said.
_MOVED = 0.05


def noise_findings(result: NoiseResult) -> list[str]:
    """Return what was found, the answer first."""
    found = _like_recipe(result)
    for curve in result.curves:
        size = where_not(curve.points, result.rise)
        if curve.at_rise is not None:
            size = f"{curve.at_rise:.3g}"
        where = f"{_NAMES[curve.kind].format(size)} on {result.place} costs {result.rise:g} nats"
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
    sentences = [
        f"Noise on {result.place} of {len(result.layers)} layers, each by its own size; slopes are "
        f"fitted where the loss is told from 0 and at most {BROKEN:g} nat."
    ]
    if result.no_actual is not None:
        sentences.append(f"No error of the recipe stands beside it: {result.no_actual}.")
    if result.actual is not None and result.place == WEIGHTS:
        own = result.actual.layers.values()
        sentences.append(
            "The size of the recipe's error is one over all layers together; that of single layers "
            f"is {min(own):.3g} to {max(own):.3g}."
        )
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


def _like_recipe(result: NoiseResult) -> list[str]:
    """Return the sentence that lays the recipe on the ruler, if it can be laid there."""
    actual = result.actual
    if actual is None or result.place != WEIGHTS:
        return []
    start = f"the recipe's weight error of {actual.size:.3g} costs {nats(actual.increase)}"
    if actual.increase.low <= 0:
        return [f"{start}: no loss that this text resolves, so that no size of noise is like it."]
    alike = [_alike(curve, result) for curve in result.curves]
    found = f"{start}: as harmful as {', and as '.join(alike)}"
    return [f"{found}{_by_its_size(result.curves[0], actual.size)}."]


def _by_its_size(curve: Curve, size: float) -> str:
    """Return whether the error does more or less harm than noise of its size, if that is known.

    It has to be so for the whole interval of its loss, and by every seed of the noise.
    """
    if curve.kind == ALIGNED or curve.like_recipe is None:
        return ""
    known = [one for one in (*curve.like_recipe, *curve.like_recipe_seeds) if one is not None]
    if len(known) < len(curve.like_recipe) + len(curve.like_recipe_seeds):
        return ""
    if size < min(known):
        return "; it does more harm than its size says"
    if size > max(known):
        return "; it does less harm than its size says"
    return "; its harm is that of its size, as far as this text and these seeds tell"


def _alike(curve: Curve, result: NoiseResult) -> str:
    """Return the noise that costs as much as the recipe: ``Gaussian noise of 0.19 [0.17, 0.2]``."""
    assert result.actual is not None
    assert curve.like_recipe is not None
    value, low, high = curve.like_recipe
    if value is None:
        size = where_not(curve.points, result.actual.increase.value)
    else:
        size = f"{value:.3g}"
        if low is not None and high is not None:
            size += f" [{low:.3g}, {high:.3g}]"
    return _NAMES[curve.kind].format(size)
