"""Prune or quantize a causal language model on load, with a calibration set of your choice.

The package imports nothing heavy: names below are loaded when first used. Importing it makes
``lm_eval`` know our model classes as soon as ``lm_eval`` is imported (see ``_autoload``).
"""

from __future__ import annotations

from lm_calib_plugin._autoload import install as _install

TYPE_CHECKING = False  # importing typing takes longer than all else that start-up does
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "CalibConfig": "lm_calib_plugin.integrations.calib_config",
    "CalibError": "lm_calib_plugin.errors",
    "CalibModelForCausalLM": "lm_calib_plugin.integrations.exported",
    "CalibPruneConfig": "lm_calib_plugin.integrations.on_load",
    "CalibPruner": "lm_calib_plugin.integrations.compressors",
    "CalibQuantConfig": "lm_calib_plugin.integrations.on_load",
    "CalibQuantizer": "lm_calib_plugin.integrations.compressors",
    "CalibrationSet": "lm_calib_plugin.calibration",
    "Recipe": "lm_calib_plugin.recipe",
    "Report": "lm_calib_plugin.report",
    "Runtime": "lm_calib_plugin.runtime",
    "UserError": "lm_calib_plugin.errors",
    "builtin_model": "lm_calib_plugin.builtin_models",
    "compress": "lm_calib_plugin.compression",
    "register": "lm_calib_plugin._autoload",
}
__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lm_calib_plugin' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


_install()
