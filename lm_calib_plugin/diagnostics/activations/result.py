"""What an inspection returns: plain values by set, by input, and by pair of sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.diagnostics.activations.inputs import Input
from lm_calib_plugin.diagnostics.activations.stream import Massive, Stream

ALL, REST = "all", "without first"


@dataclass
class OfSet:
    """What one set showed.

    ``inputs``: by name of the input and by ``all`` or ``without first``, the metrics of
    :mod:`~lm_calib_plugin.diagnostics.activations.metrics` and ``snr`` (by transform and format).
    ``halves``: by name of the input, what can be said of channels when its sequences with even
    numbers are compared with those with odd ones. ``features``: outlier features, by the same two.
    ``densities``: histograms for drawing, of the inputs that round worst.
    """

    name: str
    calibration: CalibrationSet
    inputs: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    halves: dict[str, dict[str, float | None]] = field(default_factory=dict)
    features: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    massive: list[Massive] = field(default_factory=list)
    stream: Stream | None = None
    densities: dict[str, dict[str, Any]] = field(default_factory=dict)
    unplaced: int = 0


@dataclass
class Result:
    """The answer of :func:`inspect`.

    Parameters
    ----------
    inputs
        What was looked at, in the order of the model.
    sets
        By name, what each set showed; the first is the one that others are compared with.
    pairs
        By names of two sets, name of the input and ``all`` or ``without first``: the measures of
        :mod:`~lm_calib_plugin.diagnostics.activations.compared`.
    rank_shares
        By name of the set and the input, and the same two.
    passes
        Passes of all sets through the model: more than one where Gram matrices need it.
    left_out
        Inputs whose Gram matrix has no room at all.
    settings, warnings, seconds
        What was asked for, what to know, and how long it took.
    """

    inputs: list[Input]
    sets: dict[str, OfSet]
    pairs: dict[tuple[str, str], dict[str, dict[str, dict[str, float | None]]]]
    rank_shares: dict[str, dict[str, dict[str, float | None]]]
    passes: int
    left_out: list[str]
    settings: dict[str, Any]
    warnings: list[str]
    seconds: float
