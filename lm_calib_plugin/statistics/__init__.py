"""What is remembered of the inputs of a layer: additive statistics and token samples."""

from lm_calib_plugin.statistics.base import LayerStats
from lm_calib_plugin.statistics.factor import InverseFactor, inverse_factor
from lm_calib_plugin.statistics.gram import Gram
from lm_calib_plugin.statistics.moments import Moments
from lm_calib_plugin.statistics.sample import TokenSample

STATISTICS: dict[str, type[LayerStats]] = {"moments": Moments, "gram": Gram}

__all__ = [
    "STATISTICS",
    "Gram",
    "InverseFactor",
    "LayerStats",
    "Moments",
    "TokenSample",
    "inverse_factor",
]
