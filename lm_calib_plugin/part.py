"""A stage of a method: a dataclass whose fields are its options, read from texts."""

from __future__ import annotations

import typing
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from typing_extensions import Self

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.stages import NONE, STAGES, UNIFORM, Stage, parse_stage
from lm_calib_plugin.values import flag, number, whole


@dataclass(frozen=True)
class Part(ABC):
    """One stage of a method: a dataclass whose fields are its options.

    Class attributes
    ----------------
    statistic
        What has to be known of the inputs: a kind of
        :data:`lm_calib_plugin.statistics.STATISTICS`, or ``none``.
    uses_damp, uses_compat
        Whether the ridge, or ``compat=reference``, changes what the part does.
    needs_bias, uses_heldout
        As for a method, see :class:`~lm_calib_plugin.method.Method`.
    rows_independent
        Whether the result of an output row depends on nothing but that row.
    revision
        Raised whenever the part's results change; part of the recipe key.
    """

    stage: ClassVar[str]
    statistic: ClassVar[str] = "none"
    uses_damp: ClassVar[bool] = False
    uses_compat: ClassVar[bool] = False
    rows_independent: ClassVar[bool] = False
    needs_bias: ClassVar[bool] = False
    uses_heldout: ClassVar[bool] = False
    revision: ClassVar[int] = 1
    paper: ClassVar[str] = ""

    @classmethod
    def from_texts(cls, options: Mapping[str, str]) -> Self:
        """Make the part from options as they were typed, read by the types of its fields.

        Raises
        ------
        UserError
            For a value of the wrong type; ranges are checked by the part itself.
        """
        kinds = typing.get_type_hints(cls)
        names = {option_name(f.name): f.name for f in fields(cls)}
        given = {names[k]: _read(cls.stage, k, v, kinds[names[k]]) for k, v in options.items()}
        return cls(**given)

    def options(self) -> dict[str, Any]:
        """Return every option, as it is typed, with its value."""
        return {option_name(f.name): getattr(self, f.name) for f in fields(self)}

    def at_least(self, option: str, lowest: float) -> None:
        """Refuse a value of an option below ``lowest``."""
        given = getattr(self, option)
        if given < lowest:
            name = option_name(option)
            raise UserError(self.stage, f"got {name}={given:g}", f"{name} >= {lowest:g}")

    def one_of(self, option: str, allowed: tuple[str, ...]) -> None:
        """Refuse a value of an option that is not among those allowed."""
        given = getattr(self, option)
        if given not in allowed:
            name = option_name(option)
            raise UserError(self.stage, f"got {name}={given}", f"{name}: {listed(allowed)}")


def make_part(argument: str, text: str | Stage) -> Any:
    """Return the part of a stage, None for ``none``.

    Raises
    ------
    UserError
        For a name that is not installed, or an option of the wrong kind or range.
    """
    stage = text if isinstance(text, Stage) else parse_stage(argument, text)
    entry = registry.find_part(STAGES[argument], stage.name, argument)
    # `none` and `uniform` are names for doing nothing.
    return entry.load().from_texts(stage.options) if entry.target else None


def part_text(argument: str, part: Part | None) -> str:
    """Return the part of a stage as it is typed, every option with its value."""
    if part is None:
        return UNIFORM if argument == "allocation" else NONE
    kind = STAGES[argument]
    cls = type(part)
    place = f"{cls.__module__}:{cls.__qualname__}"
    rows = registry.table(kind).items()
    name = next((n for n, e in rows if e.target == place), None)
    if name is None:
        # Another package may name a class where it is imported, not where it is written.
        foreign = (n for n, e in rows if e.distribution != registry.OURS and e.load() is cls)
        name = next(foreign, place)
    values = {k: _plain(v) for k, v in part.options().items() if v is not None}
    return Stage(name, values).text()


def option_name(field: str) -> str:
    """Return the name by which a field is typed: names that Python keeps for itself, or that a
    method has, end in an underscore as a field only."""
    return field.rstrip("_")


def _read(argument: str, option: str, value: str, kind: Any) -> Any:
    name = f"{argument}={option}"
    if kind is bool:
        return flag(name, value)
    if kind is int:
        return whole(name, value)
    if kind in (float, float | None):
        return number(name, value)
    if typing.get_origin(kind) is tuple:
        return tuple(number(name, part) for part in value.split("+"))
    return value


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(f"{v!r}" for v in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
