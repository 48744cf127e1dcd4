"""Model classes of lm-evaluation-harness that compress what they load."""

from lm_calib_plugin.harness.models import Calib, CalibPruned, CalibQuantized

__all__ = ["Calib", "CalibPruned", "CalibQuantized"]
