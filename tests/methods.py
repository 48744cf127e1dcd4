"""Methods by name, as a recipe makes them."""

from __future__ import annotations

from typing import Any

from lm_calib_plugin import registry


def method_of(name: str, **options: Any) -> Any:
    """Return a method with options, stages as texts."""
    return registry.find_method(name).make(options)
