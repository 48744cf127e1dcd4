"""Sweeps over the columns of a weight, the inner loops of second-order methods; tensors only.

Every sweep has a path in plain torch and, on CUDA devices with triton, a compiled kernel.
"""

from lm_calib_plugin.kernels.sweeps import (
    Levels,
    compiled_on,
    remove,
    remove_n_of_m,
    round_integers,
    round_with,
)

__all__ = ["Levels", "compiled_on", "remove", "remove_n_of_m", "round_integers", "round_with"]
