"""``lm-calib preflight``: which calibration set will serve which domain, before any evaluation."""

from lm_calib_plugin.preflight.judging import Preflight, preflight
from lm_calib_plugin.preflight.question import Question

__all__ = ["Preflight", "Question", "preflight"]
