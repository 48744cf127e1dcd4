"""The rows of the registry that come with this package; nothing here imports a part."""

from __future__ import annotations

from lm_calib_plugin.builtin_methods import METHODS
from lm_calib_plugin.builtin_sources import SOURCES
from lm_calib_plugin.builtin_stages import PARTS
from lm_calib_plugin.registry import Entry

BUILTIN: tuple[Entry, ...] = (*METHODS, *PARTS, *SOURCES)
