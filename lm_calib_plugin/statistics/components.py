"""Statistics taken apart into what is summed for itself, and put together again.

``gram+spread`` is a Gram matrix and a spread of the same rows, each summed as it is alone. So what
was watched for several methods at once is kept in parts, and each method gets its own kind of them,
with the bits of a pass that watched this kind only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from typing import TypeAlias

from lm_calib_plugin.statistics.base import LayerStats
from lm_calib_plugin.statistics.gram import Gram
from lm_calib_plugin.statistics.moments import Moments
from lm_calib_plugin.statistics.ranges import GramRanges, Ranges
from lm_calib_plugin.statistics.spread import GramSpread, Spread

SINGLE: dict[str, type[LayerStats]] = {
    "moments": Moments,
    "gram": Gram,
    "spread": Spread,
    "ranges": Ranges,
}
_JOINT: dict[str, type[LayerStats]] = {"gram+spread": GramSpread, "gram+ranges": GramRanges}
HELDOUT = "heldout"

# The kind of a statistic of one part, and whether it is that of the sequences held out.
Component: TypeAlias = tuple[str, bool]


def components(kind: str, heldout: bool = False) -> frozenset[Component]:
    """Return what a kind of statistic consists of; ``heldout``: also of sequences held out.

    ``gram+heldout`` says the same in one word.
    """
    names = [name for name in kind.split("+") if name not in ("none", HELDOUT)]
    sides = (False, True) if heldout or HELDOUT in kind.split("+") else (False,)
    return frozenset((name, side) for name in names for side in sides)


def known_kinds() -> list[str]:
    """Return all words that :func:`components` understands."""
    kinds = [*SINGLE, *_JOINT]
    return ["none", *kinds, *(f"{kind}+{HELDOUT}" for kind in kinds)]


def taken_apart(kind: str, stats: LayerStats | None) -> dict[Component, LayerStats]:
    """Return the parts of a statistic; they share its tensors."""
    if stats is None:
        return {}
    found: dict[Component, LayerStats] = {}
    for side, whole in ((False, stats), (True, stats.heldout)):
        if whole is None:
            continue
        first, *others = kind.split("+")
        for name in others:
            found[name, side] = getattr(whole, name)
        content = {k: v for k, v in vars(whole).items() if k not in others}
        found[first, side] = _made(SINGLE[first], content | {HELDOUT: None})
    return found


def put_together(
    kind: str, heldout: bool, parts: Mapping[Component, LayerStats]
) -> LayerStats | None:
    """Return a statistic made of its parts, whose tensors it takes; None for ``none``."""
    if kind == "none":
        return None
    first, *others = kind.split("+")
    sides = []
    for side in (False, True) if heldout else (False,):
        whole = copy(parts[first, side])
        if others:
            beside = {name: parts[name, side] for name in others}
            whole = _made(_JOINT[kind], vars(whole) | beside)
        sides.append(whole)
    stats, *kept = sides
    stats.heldout = kept[0] if kept else None
    return stats


def listed_components(parts: Iterable[Component]) -> str:
    """Return parts in words: ``gram, moments+heldout``."""
    return ", ".join(sorted(name + f"+{HELDOUT}" * side for name, side in parts))


def _made(kind: type[LayerStats], content: Mapping[str, object]) -> LayerStats:
    """Return a statistic that has this content; making an empty one would take memory."""
    made = kind.__new__(kind)
    vars(made).update(content)
    return made
