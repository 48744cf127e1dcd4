"""What rounding does to the inputs: ``10 log10(||x||^2 / ||x - Q(x)||^2)``, in decibels.

Measured on the rows of the samples, with the levels that compression uses
(:class:`~lm_calib_plugin.quantization.activations.ActivationSpec`). One scale for the whole tensor
comes from the largest value of *all* tokens of the set, which is known exactly. Rows of first
tokens and of all others are sampled apart and weighted by how many there are.

Over all values one huge value hides everything: it is most of the signal, and is rounded well. So
there is also the ratio of the *median token*: of the ratios of single tokens, the middle one.

``smoothed``: after SmoothQuant with alpha 0.5 (``x_j / s_j``, from the largest inputs of the set
and the weights of the layers that read it); the noise is that of the smoothed inputs, relative to
them, as is the signal. ``rotated``: after a random Hadamard rotation of the channels; there the
largest value is that of the sample. Rounding of weights is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.diagnostics.activations.seen import Seen
from lm_calib_plugin.quantization.activations import ActivationSpec
from lm_calib_plugin.quantization.hadamard import Hadamard
from lm_calib_plugin.quantization.transforms.smoothquant import smoothing

# Name -> levels. "tensor": one scale for all; "token": one a row.
FORMATS = {
    "int8 per tensor": ActivationSpec("int", 8, dynamic=False),
    "int8 per token": ActivationSpec("int", 8),
    "fp8 per tensor": ActivationSpec("fp8", dynamic=False),
    "int4 per token": ActivationSpec("int", 4),
}
PLAIN, SMOOTHED, ROTATED = "plain", "smoothed", "rotated"
# Behind the name of a transform: the ratio of the median token.
MEDIAN = ", median token"
ALPHA = 0.5


@dataclass(frozen=True)
class Rows:
    """Sampled rows ``[kept, in]`` that stand for ``count`` rows."""

    rows: Tensor
    count: int


def ratios(
    parts: Sequence[Seen], inner: Tensor | None = None, seed: int = 0, transforms: bool = True
) -> dict[str, dict[str, float | None]]:
    """Return the ratio in dB of every format, by transform.

    Parameters
    ----------
    parts
        What was seen: first tokens and the rest, or the rest alone.
    inner
        Largest absolute weight of every channel over the layers that read the input, ``[in]``;
        None leaves SmoothQuant out.
    seed
        Of the rotation.
    transforms
        Whether transforms are looked at.

    Returns
    -------
    dict
        By transform, and by transform and ``MEDIAN``: the ratios by format. Infinite where nothing
        is lost; None where there is nothing to round.
    """
    samples = [
        Rows(part.sample.rows, part.rows)
        for part in parts
        if part.rows and part.sample.rows is not None
    ]
    peak = torch.stack([part.peak for part in parts]).amax(0)
    found = _ratios(PLAIN, samples, float(peak.max()))
    if not transforms:
        return found
    if inner is not None:
        s = smoothing(peak, inner.to(peak), ALPHA)
        smooth = [Rows(one.rows / s.to(one.rows), one.count) for one in samples]
        found |= _ratios(SMOOTHED, smooth, float((peak / s).max()))
    turn = Hadamard.random(len(peak), derive_seed("activations rotation", seed))
    turned = [Rows(turn.apply(one.rows).float(), one.count) for one in samples]
    limit = max((float(one.rows.abs().max()) for one in turned), default=0.0)
    return found | _ratios(ROTATED, turned, limit)


def _ratios(name: str, samples: Sequence[Rows], limit: float) -> dict[str, dict[str, float | None]]:
    both = {kind: _ratio(samples, spec, limit) for kind, spec in FORMATS.items()}
    return {
        name: {kind: total for kind, (total, _) in both.items()},
        name + MEDIAN: {kind: middle for kind, (_, middle) in both.items()},
    }


def _ratio(
    samples: Sequence[Rows], spec: ActivationSpec, limit: float
) -> tuple[float | None, float | None]:
    """Return the ratio over all values, and that of the median token."""
    signals, noises, weights = [], [], []
    for one in samples:
        bound = None if spec.dynamic else torch.tensor(limit, device=one.rows.device)
        lost = spec.round(one.rows, bound) - one.rows
        signals.append(one.rows.double().square().sum(1))
        noises.append(lost.double().square().sum(1))
        weights.append(torch.full_like(signals[-1], one.count / len(one.rows)))
    if not samples:
        return None, None
    signal, noise, weight = torch.cat(signals), torch.cat(noises), torch.cat(weights)
    some = signal > 0
    if not bool(some.any()):
        return None, None
    total = float((weight * signal).sum()), float((weight * noise).sum())
    single, order = (signal[some] / noise[some]).sort()
    reached = weight[some][order].cumsum(0)
    place = int(torch.searchsorted(reached, reached[-1] / 2))
    return _decibels(*total), _decibels(float(single[place]), 1.0)


def _decibels(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise and math.isfinite(signal) else math.inf
