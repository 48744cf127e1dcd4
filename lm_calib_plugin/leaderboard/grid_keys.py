"""Values of single keys of a grid file: checked, and brought to one form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.schemes import SCHEMES
from lm_calib_plugin.values import whole

# Arguments of the harness that may stand in a grid.
HARNESS = (
    "num_fewshot", "limit", "batch_size", "max_batch_size", "device", "include_path",
    "apply_chat_template", "fewshot_as_multiturn", "system_instruction", "gen_kwargs", "seed",
    "confirm_run_unsafe_code",
)  # fmt: skip
SEEDS = 4  # of random, numpy, torch and the choice of shots
CONTROLS = ("data_free", "repeat", "null")
DEFAULT_NULL = "null:random"
_PERCENT = re.compile(r"^(\d+(?:\.\d+)?) ?%$")
_PATTERN = re.compile(r"^\d+:\d+$")
_BITS = re.compile(r"^[wW](\d+)$")


@dataclass(frozen=True)
class Controls:
    """What is added by itself; ``data_free`` and ``null`` may name something, or be off (None).

    ``data_free=True`` takes ``magnitude`` or ``rtn``, as the levels need.
    """

    data_free: str | bool = True
    repeat: bool = True
    null: str | None = DEFAULT_NULL


def named(place: str, given: Any, main: str) -> dict[str, dict[str, Any]]:
    """Return name -> fields of an axis: a list of texts, or a mapping to texts or fields."""
    if given is None:
        return {}
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list):
        given = {str(one): one for one in given}
    found = {}
    for name, one in mapping(place, given).items():
        fields = dict(one) if isinstance(one, Mapping) else {main: one}
        if main == "method":
            fields.setdefault(main, name)
        if not all(isinstance(key, str) for key in fields) or fields.get(main, "") is None:
            raise UserError(
                f"{place}.{name}", f"got {one!r}", f"a text, or fields and `{main}: NAME`"
            )
        found[str(name)] = fields
    return found


def levels(given: Any) -> dict[str, dict[str, Any]]:
    """Return name -> fields of a recipe, of a list or a mapping."""
    if not isinstance(given, (list, Mapping)):
        given = [given]
    if isinstance(given, list):
        return {str(one): _level(one) for one in given}
    return {
        str(name): dict(one) if isinstance(one, Mapping) else _level(one)
        for name, one in given.items()
    }


def _level(given: Any) -> dict[str, Any]:
    """Return the recipe fields of ``50%``, ``0.5``, ``2:4``, ``W3``, ``3`` or a scheme."""
    text = str(given).strip()
    if match := _PERCENT.match(text):
        return {"sparsity": float(match[1]) / 100}
    if _PATTERN.match(text):
        return {"pattern": text}
    if match := _BITS.match(text):
        return {"bits": int(match[1])}
    if text in SCHEMES:
        return {"scheme": text}
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return {"sparsity": given} if 0 <= given < 1 else {"bits": given}
    raise UserError(
        "levels",
        f"got {given!r}",
        "50%, 2:4, W3, a scheme, or NAME: {field: value}",
        "for instance levels: [50%, 2:4]",
    )


def controls(given: Any) -> Controls:
    """Return what is added by itself."""
    if given is True:
        return Controls()
    if given in (False, None):
        return Controls(False, False, None)
    found = mapping("controls", given)
    for name in found:
        if name not in CONTROLS:
            raise UserError(
                f"controls.{name}", "unknown", nearest(name, CONTROLS), listed(CONTROLS)
            )
    null = found.get("null", True)
    return Controls(
        found.get("data_free", True) or False,
        bool(found.get("repeat", True)),
        DEFAULT_NULL if null is True else null or None,
    )


def draws(given: Any) -> tuple[int, ...]:
    """Return the seeds of ``draws``: as many as a number says, or those of a list."""
    if isinstance(given, list):
        seeds = tuple(whole("draws", seed, lowest=0) for seed in given)
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError("draws", f"got {given!r}", "different seeds, at least one")
        return seeds
    return tuple(range(whole("draws", given, lowest=1)))


def tasks(given: Any) -> tuple[str, ...]:
    """Return the tasks, of a list or of a text with commas."""
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        raise UserError("tasks", f"got {given!r}", "a list of task names or YAML files")
    found = tuple(name.strip() for name in names)
    if len(set(found)) < len(found):
        raise UserError("tasks", f"got {listed(found)}", "every task once")
    return found


def chance(given: Any) -> dict[str, float]:
    """Return the score of guessing, by task."""
    found = {}
    for task, value in mapping("chance", given).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise UserError(f"chance.{task}", f"got {value!r}", "a score of guessing, 0 <= c < 1")
        found[task] = float(value)
    return found


def harness(given: Any) -> dict[str, Any]:
    """Return arguments of the harness, without those that are not set."""
    found = mapping("harness", given)
    for name in found:
        if name not in HARNESS:
            raise UserError(f"harness.{name}", "unknown", nearest(name, HARNESS), listed(HARNESS))
    seeds = found.get("seed")
    if isinstance(seeds, list) and len(seeds) != SEEDS:
        raise UserError("harness.seed", f"got {seeds}", f"one number, or {SEEDS} of them")
    return {name: value for name, value in found.items() if value is not None}


def mapping(place: str, given: Any) -> dict[str, Any]:
    """Return a mapping whose names are texts."""
    if not isinstance(given, Mapping) or not all(isinstance(k, (str, int, float)) for k in given):
        raise UserError(place, f"got {given!r}", "`name: value` lines")
    return {str(name): value for name, value in given.items()}


def listing(key: str, content: Mapping[str, Any]) -> list[Any]:
    """Return the list of a key; an empty one where it is not given."""
    given = content.get(key) or []
    if not isinstance(given, list):
        raise UserError(key, f"got {given!r}", "a list")
    return given


def text(key: str, given: Any) -> str:
    """Return a text."""
    if not isinstance(given, (str, int, float)):
        raise UserError(key, f"got {given!r}", "a text")
    return str(given)
