"""What a model is sensitive to: which parts carry the damage, how much noise it takes, which
blocks it would miss least."""

from lm_calib_plugin.diagnostics.sensitivity.depth import DepthResult, Ranking, probe_depth
from lm_calib_plugin.diagnostics.sensitivity.groups import GroupsResult, probe_groups
from lm_calib_plugin.diagnostics.sensitivity.judge import Judge
from lm_calib_plugin.diagnostics.sensitivity.noise import NoiseResult, probe_noise
from lm_calib_plugin.diagnostics.sensitivity.options import SensitivityOptions
from lm_calib_plugin.diagnostics.sensitivity.parts import Group, block_groups, component_groups
from lm_calib_plugin.diagnostics.sensitivity.sensitivity import inspect_sensitivity, sensitivity_of
from lm_calib_plugin.diagnostics.sensitivity.variants import Compressed, compress_twin

__all__ = [
    "Compressed",
    "DepthResult",
    "Group",
    "GroupsResult",
    "Judge",
    "NoiseResult",
    "Ranking",
    "SensitivityOptions",
    "block_groups",
    "component_groups",
    "compress_twin",
    "inspect_sensitivity",
    "probe_depth",
    "probe_groups",
    "probe_noise",
    "sensitivity_of",
]
