"""The statistics bank: one dense pass, then every calibration set is a vector of weights."""

from lm_calib_plugin.bank.build import Part, build_bank
from lm_calib_plugin.bank.store import Bank

__all__ = ["Bank", "Part", "build_bank"]
