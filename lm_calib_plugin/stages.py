"""Stages of a method, as they are typed: ``name`` or ``name?option=value&option=value``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.registry import STAGES as STAGES

NONE, UNIFORM, MINMAX = "none", "uniform", "minmax"
# What a stage is when neither the method nor the user names it.
DEFAULTS = {
    "allocation": UNIFORM,
    "refine": NONE,
    "update": NONE,
    "transform": NONE,
    "grid": MINMAX,
    "observer": MINMAX,
}


@dataclass(frozen=True)
class Stage:
    """One stage: the name of the part that does it, and its options as texts."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Return the stage as it is typed."""
        options = "&".join(f"{k}={v}" for k, v in self.options.items())
        return self.name + (f"?{options}" if options else "")


def parse_stage(argument: str, value: Any) -> Stage:
    """Read one stage; in YAML it may be a mapping of ``name`` and options, too.

    Raises
    ------
    UserError
        For a part that is not installed, or an option that it does not have.
    """
    stage = (
        _from_mapping(argument, value)
        if isinstance(value, Mapping)
        else _from_text(argument, value)
    )
    entry = registry.find_part(STAGES[argument], stage.name, argument)
    for option in stage.options:
        if option not in entry.options:
            raise UserError(
                argument,
                f"`{option}` is not an option of `{stage.name}`; " + nearest(option, entry.options),
                f"its options: {listed(entry.options) or 'none'}",
                f"for instance {argument}={stage.name}"
                + (f"?{entry.options[0]}=VALUE" if entry.options else ""),
            )
    return stage


def _from_mapping(argument: str, value: Mapping[str, Any]) -> Stage:
    options = {str(k): v for k, v in value.items()}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(argument, f"got {dict(value)!r}", "a mapping with the `name` of the part")
    return Stage(name, {k: _as_text(v) for k, v in options.items()})


def _from_text(argument: str, value: Any) -> Stage:
    name, _, rest = str(value).strip().partition("?")
    options = {}
    for pair in rest.split("&") if rest else ():
        key, _, given = pair.partition("=")
        if key.strip() in options:
            raise UserError(argument, f"got {key.strip()} twice in `{value}`", "every option once")
        options[key.strip()] = given.strip()
    return Stage(name.strip(), options)


def _as_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
