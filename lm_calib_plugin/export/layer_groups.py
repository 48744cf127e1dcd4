"""Names of layers, as few patterns as possible that match these and no others."""

from __future__ import annotations

import re
from collections.abc import Sequence

# All linear layers that are not on the list of exceptions: what every reader of the format knows.
ALL = ["Linear"]
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


def patterns(kinds: Sequence[Sequence[str]], others: Sequence[str]) -> list[list[str]]:
    r"""Return the targets of each kind of layer.

    Parameters
    ----------
    kinds
        Names of the quantized layers, kind by kind.
    others
        Names of the layers that are not quantized.

    Returns
    -------
    list
        ``["Linear"]`` for a single kind. Else names for each, or, where all blocks agree about a
        place in a block, one expression for it, such as
        ``re:^model\.layers\.\d+\.mlp\.down_proj$``. It is anchored at both ends, since readers
        match from the start only; and `Linear` does not occur, since some readers look for it
        before they look for the parts of layers that they merged.
    """
    if len(kinds) == 1:
        return [ALL]
    kinds_of: dict[str, set[int]] = {}
    for index, names in enumerate([*kinds, others]):
        for name in names:
            kinds_of.setdefault(_place(name), set()).add(index)
    found = []
    for names in kinds:
        own = [_place(n) if len(kinds_of[_place(n)]) == 1 else n for n in names]
        found.append(list(dict.fromkeys(own)))
    return found


def _place(name: str) -> str:
    """Return the expression for a place in any block; the name itself outside of blocks."""
    parts = _INDEX.split(name, maxsplit=1)
    return name if len(parts) == 1 else rf"re:^{re.escape(parts[0])}\d+{re.escape(parts[1])}$"
