"""Packers: how documents are cut into sequences of at most ``seqlen`` tokens.

No special token is put inside a window (``longdoc``, ``concat``, ``windows``, ``multilen``); a row
of ``pad`` or ``icl`` is a text as the tokenizer writes it by default, with its start token where
the tokenizer adds one.
"""

from lm_calib_plugin.calibration.packers.base import Packed, Packer
from lm_calib_plugin.calibration.packers.concat import Concatenate
from lm_calib_plugin.calibration.packers.icl import InContext
from lm_calib_plugin.calibration.packers.longdoc import LongDocument
from lm_calib_plugin.calibration.packers.multilen import SeveralLengths
from lm_calib_plugin.calibration.packers.pad import Pad
from lm_calib_plugin.calibration.packers.windows import Windows

__all__ = [
    "Concatenate",
    "InContext",
    "LongDocument",
    "Packed",
    "Packer",
    "Pad",
    "SeveralLengths",
    "Windows",
]
