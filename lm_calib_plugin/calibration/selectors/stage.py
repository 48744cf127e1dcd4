"""The stage between packing and the final set: how large pools are, and picking from one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from lm_calib_plugin import registry
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.features import Features
from lm_calib_plugin.calibration.sources.base import Context
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.expression import shares
from lm_calib_plugin.recipe import RANDOM_SELECTION, Recipe

POOL = 8  # candidates for each sequence asked, when the recipe does not say
TARGETS = 32  # sequences of `select_target`


def make_selector(name: str) -> Selector:
    """Return the selector of a name.

    Raises
    ------
    CalibError
        When the registered class (of another package) is no selector.
    """
    entry = registry.find("selection", name, "select")
    made = entry.load()
    if not (isinstance(made, type) and issubclass(made, Selector)):
        raise CalibError(
            f"selector `{name}` of {entry.distribution}: {entry.target} is not a subclass of "
            f"{Selector.__module__}.Selector."
        )
    return made()


def pool_sizes(recipe: Recipe, counts: Sequence[int]) -> list[int]:
    """Return the number of candidates of each term: its share of the pool, never too few.

    Without ``select`` and ``pool`` it is the number asked, and nothing is selected.
    """
    if recipe.select == RANDOM_SELECTION and recipe.pool is None:
        return list(counts)
    total = recipe.pool or POOL * recipe.nsamples
    parts = shares(recipe.terms, total)
    return [max(part, count) if count else 0 for part, count in zip(parts, counts, strict=True)]


def check_model(recipe: Recipe, model: Any) -> None:
    """Refuse a selector that needs the model when there is none.

    Raises
    ------
    UserError
        With the selectors that need none.
    """
    needs = make_selector(recipe.select).needs - {"words"}
    if needs and model is None:
        free = [
            name
            for name, entry in registry.table("selection").items()
            if entry.distribution == registry.OURS and not make_selector(name).needs - {"words"}
        ]
        raise UserError(
            "select",
            f"`{recipe.select}` needs the model in memory",
            f"selectors that need none: {', '.join(free)}",
            "give the model, or another selector",
        )


def choose(
    recipe: Recipe,
    sequences: Sequence[Sequence[int]],
    count: int,
    context: Context,
    targets: Sequence[Sequence[int]],
) -> tuple[list[int], dict[str, Any]]:
    """Pick ``count`` of the sequences of one term.

    Returns
    -------
    chosen
        Places in ``sequences``, in order of choice.
    record
        Selector, size of the pool, what it cost, and facts of the selector.
    """
    if count == len(sequences):  # nothing to choose, and nothing to compute
        return list(range(count)), {"selector": recipe.select, "pool": count, "seconds": 0.0}
    began = time.perf_counter()
    selector = make_selector(recipe.select)
    size = context.runtime.calib_batch_size
    given: dict[str, Any] = {
        "model": context.model,
        "tokenizer": context.tokenizer,
        "blocks": recipe.blocks,
        "batch_size": size if isinstance(size, int) else None,
        "progress": context.runtime.progress,
    }
    candidates = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    aims = [torch.tensor(ids, dtype=torch.int64) for ids in targets]
    target = Features(aims, selector.needs, **given) if aims else None
    features = Features(candidates, selector.needs, **given, target=target)
    seed = derive_seed(context.seed, "select", recipe.select)
    chosen = selector.select(candidates, count, features, seed)
    if len(set(chosen)) != count or not all(0 <= i < len(candidates) for i in chosen):
        raise CalibError(
            f"selector `{recipe.select}` gave {len(set(chosen))} different places, {count} asked."
        )
    cost = {name: part.cost for name, part in (("pool", features), ("target", target)) if part}
    return chosen, {
        "selector": recipe.select,
        "pool": len(candidates),
        "seconds": round(time.perf_counter() - began, 3),
        "passes": {name: facts for name, facts in cost.items() if facts},
        **selector.facts,
    }
