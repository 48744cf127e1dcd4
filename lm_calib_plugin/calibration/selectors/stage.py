"""The stage between packing and the final set: how large pools are, and picking from one."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin import registry
from lm_calib_plugin.calibration.calibration_set import identity
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.features import Features
from lm_calib_plugin.calibration.sources.base import Context
from lm_calib_plugin.calibration.tokens import tokenizer_digest
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.expression import SourceTerm, expression_text
from lm_calib_plugin.recipe import Recipe

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


def selection_needs_model(recipe: Recipe) -> bool:
    """Tell whether the selector asks the model anything."""
    return bool(make_selector(recipe.select).needs - {"words"})


def check_model(recipe: Recipe, model: Any) -> None:
    """Refuse a selector that needs the model when there is none.

    Raises
    ------
    UserError
        With the selectors that need none.
    """
    if model is None and selection_needs_model(recipe):
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


@dataclass(frozen=True)
class Choice:
    """How each term's share is chosen from a pool.

    Parameters
    ----------
    recipe
        ``select``, ``pool``, ``nsamples``, ``select_target`` and ``block_path`` are read.
    targets
        Sequences that the pool is compared with; empty for selectors that take none.
    """

    recipe: Recipe
    targets: Sequence[Sequence[int]] = ()
    _target: list[Features] = field(default_factory=list)

    def widened(self, term: SourceTerm, context: Context) -> Context:
        """Return the context that asks a term for its pool instead of its share.

        The pool of a term is its weight times ``pool``, rounded up, and at least its share.
        """
        if not context.count:
            return context
        total = self.recipe.pool or POOL * self.recipe.nsamples
        size = max(context.count, math.ceil(term.weight * total - 1e-9))
        named = "pool" if size > context.count else context.count_of
        return replace(context, count=size, count_of=named)

    def choose(
        self, sequences: Sequence[Sequence[int]], count: int, context: Context
    ) -> tuple[list[int], dict[str, Any]]:
        """Pick ``count`` of the sequences of one term.

        Returns
        -------
        chosen
            Places in ``sequences``, in order of choice.
        record
            Selector, size of the pool, what it cost, and facts of the selector.
        """
        recipe = self.recipe
        record: dict[str, Any] = {"selector": recipe.select, "pool": len(sequences)}
        if count == len(sequences):  # nothing to choose, and nothing to compute
            return list(range(count)), record | {"seconds": 0.0}
        began = time.perf_counter()
        selector = make_selector(recipe.select)
        candidates, features = self._features(selector, sequences, context)
        seed = derive_seed(context.seed, "select", recipe.select)
        chosen = selector.select(candidates, count, features, seed)
        if len(set(chosen)) != count or not all(0 <= i < len(candidates) for i in chosen):
            raise CalibError(
                f"selector `{recipe.select}` gave {len(set(chosen))} different places, "
                f"{count} asked."
            )
        record["seconds"] = round(time.perf_counter() - began, 3)
        costs = {"pool": features.cost}
        if self.targets:
            costs["target"] = features.target.cost
            record["target"] = {
                "source": expression_text(recipe.select_target or ()),
                "nsequences": len(self.targets),
                "digest": identity(tokenizer_digest(context.tokenizer), self.targets),
            }
        passes = {name: cost for name, cost in costs.items() if cost}
        return chosen, record | {"passes": passes, **selector.facts, "warnings": selector.warnings}

    def _features(
        self, selector: Selector, sequences: Sequence[Sequence[int]], context: Context
    ) -> tuple[list[Tensor], Features]:
        size = context.runtime.calib_batch_size
        given: dict[str, Any] = {
            "model": context.model,
            "tokenizer": context.tokenizer,
            "blocks": self.recipe.block_path,
            "batch_size": size if isinstance(size, int) else None,
            "progress": context.runtime.progress,
        }
        candidates = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
        aims = [torch.tensor(ids, dtype=torch.int64) for ids in self.targets]
        if aims and not self._target:  # one pass serves every term
            self._target.append(Features(aims, selector.needs, **given))
        target = self._target[0] if aims else None
        return candidates, Features(candidates, selector.needs, **given, target=target)
