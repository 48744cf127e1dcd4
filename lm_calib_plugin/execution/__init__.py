"""Real low-precision kernels in place of simulated layers (``execution=packed``).

``check_execution`` asks before any work whether a scheme can run packed on a device; ``pack``
replaces layers of a simulated model, checks each against the simulated one, times it against the
dense one, and tells what stays dense and why; ``unpack`` puts everything back.
"""

from lm_calib_plugin.execution.base import PackedLinear
from lm_calib_plugin.execution.check import KERNELS, available, check_execution
from lm_calib_plugin.execution.choose import PackLayer, pack, unpack
from lm_calib_plugin.execution.facts import Activation, Device, Facts
from lm_calib_plugin.execution.fp8 import FP8Linear
from lm_calib_plugin.execution.int4 import Int4WeightOnly
from lm_calib_plugin.execution.int8 import Int8Linear
from lm_calib_plugin.execution.int8_cpu import Int8CPULinear
from lm_calib_plugin.execution.report import ExecutionReport, LayerExecution, Race
from lm_calib_plugin.execution.semi_sparse import SemiSparseLinear

__all__ = [
    "KERNELS",
    "Activation",
    "Device",
    "ExecutionReport",
    "FP8Linear",
    "Facts",
    "Int4WeightOnly",
    "Int8CPULinear",
    "Int8Linear",
    "LayerExecution",
    "PackLayer",
    "PackedLinear",
    "Race",
    "SemiSparseLinear",
    "available",
    "check_execution",
    "pack",
    "unpack",
]
