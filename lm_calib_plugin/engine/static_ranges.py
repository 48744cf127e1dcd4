"""Calibrated ranges of the inputs of the layers of a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.engine.passes import BlockPass
from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.quantization.activations import ActivationSpec
from lm_calib_plugin.statistics import Ranges


def input_ranges(walk: BlockPass, index: int, layers: Sequence[TargetLayer]) -> dict[str, Ranges]:
    """Run block ``index`` once more and return the ranges of the inputs of its layers, by name.

    The weights of the block are compressed by now, its inputs those that earlier blocks, rounded
    inputs and all, produce. Sequences held out do not count.
    """
    groups = walk.groups(index, layers)

    def start() -> list[Ranges]:
        return [Ranges.empty(g[0].shape[1], g[0].device) for g in groups.groups]

    found = walk.observe(index, groups, start, count, keep=False)
    return {
        layer.name: ranges
        for group, ranges in zip(groups.groups, found, strict=True)
        for layer in group
    }


def count(
    ranges: Sequence[Ranges], chunk: Chunk, number: int, received: Tensor, owners: Tensor
) -> None:
    """Add input rows ``[tokens, in]`` of a chunk to input ``number``, unless it is held out."""
    if not chunk.heldout:
        weights = chunk.weights_of(owners)
        ranges[number].update(received, weights, owners)


def limits_of(
    ranges: dict[str, Ranges], spec: ActivationSpec, observer: Any, skipped: bool
) -> dict[str, tuple[float, float | None]]:
    """Return the limit of every input, and what it is without first tokens, by name.

    ``skipped`` tells that first tokens were not counted at all: then nothing is known of them.
    """
    made: dict[int, tuple[float, float | None]] = {}
    rest = None if skipped or not hasattr(observer, "first") else replace(observer, first=False)
    for name, one in ranges.items():
        if id(one) not in made:
            if not one.is_finite():
                raise NumericalError(name, "activations", "NaN or Inf in what the layer receives")
            without = None if rest is None else rest.limit(one, spec)
            made[id(one)] = (observer.limit(one, spec), without)
    return {name: made[id(one)] for name, one in ranges.items()}
