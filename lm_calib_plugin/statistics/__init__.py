"""What is remembered of the inputs of a layer: additive statistics and token samples."""

from collections.abc import Iterable

from lm_calib_plugin.statistics.base import LayerStats
from lm_calib_plugin.statistics.components import (
    SINGLE,
    Component,
    components,
    known_kinds,
    listed_components,
    put_together,
    taken_apart,
)
from lm_calib_plugin.statistics.factor import (
    InverseFactor,
    cholesky_factors,
    inverse_factor,
    remembered_factors,
)
from lm_calib_plugin.statistics.gram import Gram, gram_in, output_error
from lm_calib_plugin.statistics.moments import Moments
from lm_calib_plugin.statistics.ranges import GramRanges, Ranges, ranges_in
from lm_calib_plugin.statistics.sample import TokenSample
from lm_calib_plugin.statistics.spread import GramSpread, Spread, spread_in

STATISTICS: dict[str, type[LayerStats]] = {
    "moments": Moments,
    "gram": Gram,
    "spread": Spread,
    "gram+spread": GramSpread,
    "ranges": Ranges,
    "gram+ranges": GramRanges,
}
# What the statistics bank can give.
BANKED = ("none", "moments", "gram")


def statistic_of(kinds: Iterable[str]) -> str:
    """Return the one kind of statistic that holds all of these.

    Raises
    ------
    ValueError
        For both spread and ranges: nothing holds them together.
    """
    wanted = set(kinds) - {"none"}
    order = ("gram", "spread", "ranges")
    names = [kind for kind in order if any(kind in w.split("+") for w in wanted)]
    if {"spread", "ranges"} <= set(names):
        raise ValueError("no statistic holds both spread and ranges")
    return "+".join(names) or ("moments" if wanted else "none")


__all__ = [
    "BANKED",
    "SINGLE",
    "STATISTICS",
    "Component",
    "Gram",
    "GramRanges",
    "GramSpread",
    "InverseFactor",
    "LayerStats",
    "Moments",
    "Ranges",
    "Spread",
    "TokenSample",
    "cholesky_factors",
    "components",
    "gram_in",
    "inverse_factor",
    "known_kinds",
    "listed_components",
    "output_error",
    "put_together",
    "ranges_in",
    "remembered_factors",
    "spread_in",
    "statistic_of",
    "taken_apart",
]
