"""Experts that saw few tokens borrow from what all experts of their layer saw."""

from __future__ import annotations

from collections.abc import Sequence

from lm_calib_plugin.engine.joining import add_up
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.engine.ranks import Ranks
from lm_calib_plugin.statistics import LayerStats

ENOUGH = 2  # tokens for each input


def fill_up(
    seen: Sequence[tuple[TargetLayer, LayerStats]],
    ranks: Ranks | None = None,
    complete: Sequence[bool] | None = None,
) -> dict[str, int]:
    """Fill the statistics of experts up to twice as many tokens as they have inputs.

    With fewer tokens a Gram matrix is singular or nearly so, and second moments are noisy. What is
    missing is taken from the sum over all experts of the same projection, scaled to the missing
    number of tokens: shrinkage toward the layer's shared statistic that fades out as an expert
    sees more. An expert without any token keeps its empty statistic, with which every method
    does what it does without data.

    Parameters
    ----------
    seen
        Layers of one block with their statistics, which are changed in place.
    ranks
        The processes that divide the work.
    complete
        Whether the statistics of each layer are complete here; of others only the number of tokens
        is right. Default: all.

    Returns
    -------
    dict
        Name of the layer -> number of tokens borrowed.
    """
    ranks = ranks or Ranks()
    projections: dict[tuple[int, str], list[tuple[TargetLayer, LayerStats, bool]]] = {}
    for (layer, stats), here in zip(seen, complete or [True] * len(seen), strict=True):
        if layer.expert is not None:
            projections.setdefault((id(layer.module), layer.part), []).append((layer, stats, here))
    borrowed: dict[str, int] = {}
    for own in projections.values():
        few = [(x, s, here) for x, s, here in own if 0 < s.tokens < ENOUGH * s.in_features]
        if not few:
            continue
        shared = type(own[0][1]).empty(own[0][1].in_features, own[0][1].device)
        for _, stats, here in own:
            if here:
                shared.merge(stats)
        if ranks.several:
            add_up([shared], [None], ranks, "experts")
        for layer, stats, here in few:
            missing = ENOUGH * stats.in_features - stats.tokens
            borrowed[layer.name] = missing
            if here:
                stats.borrow(shared, missing / shared.tokens)
    return borrowed
