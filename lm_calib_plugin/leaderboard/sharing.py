"""Which cells of a leaderboard see the same inputs, and what they have to know of them together."""

from __future__ import annotations

from collections.abc import Iterable

from lm_calib_plugin import engine
from lm_calib_plugin.bank.mixtures import mixture_of
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.storage import digest

# What decides, beside the calibration set, what is seen of it.
SEEN_BY = ("heldout", "exclude_first_token", "block_path")


class Expected:
    """Kinds of statistics that cells still to come need, by what they share.

    Parameters
    ----------
    cells
        Those that may be measured.
    """

    def __init__(self, cells: Iterable[Cell] = ()) -> None:
        self._kinds: dict[str, dict[str, str]] = {}
        for cell in cells:
            needs = needs_of(cell)
            if needs is not None:
                self._kinds.setdefault(needs[0], {})[cell.key] = needs[1]

    def kinds(self, cell: Cell) -> set[str]:
        """Return what has to be known of the inputs of a cell, by it and by those after it."""
        needs = needs_of(cell)
        return set() if needs is None else {needs[1], *self._kinds.get(needs[0], {}).values()}

    def done(self, cell: Cell) -> None:
        """Expect a cell no more."""
        for kinds in self._kinds.values():
            kinds.pop(cell.key, None)


def needs_of(cell: Cell) -> tuple[str, str] | None:
    """Return a name of the inputs that a cell looks at, and which statistics it needs of them.

    None for a cell that shares none: the dense model, methods without data, repeats,
    ``propagate=compressed``, and mixtures, which are found for each method anew.
    """
    if cell.recipe is None or cell.repeat:
        return None
    try:
        recipe = Recipe(**cell.recipe)
        method = recipe.make_method()
    except UserError:  # its record will say so
        return None
    dense = recipe.propagate == "dense" and not recipe.true_sequential
    if not dense or not recipe.terms or mixture_of(recipe) is not None:
        return None
    kind = engine.kind_of(method)
    if kind is None:
        return None
    fields = [*Recipe.calibration_fields(), *SEEN_BY]
    seen = {field: repr(getattr(recipe, field)) for field in fields}
    return digest([dict(cell.loading), seen]), kind
