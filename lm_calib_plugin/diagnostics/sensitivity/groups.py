"""Which part of a model carries the damage: all but one part compressed, and only one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from lm_calib_plugin.comparison.numbers import Array, Interval
from lm_calib_plugin.diagnostics.sensitivity.judge import Judge, Share, plain
from lm_calib_plugin.diagnostics.sensitivity.parts import Group
from lm_calib_plugin.diagnostics.sensitivity.variants import EXCHANGED, RECOMPRESSED, Compressed
from lm_calib_plugin.engine import shared_statistics
from lm_calib_plugin.guard import left_as_found


@dataclass(frozen=True)
class GroupRow:
    """What one group does.

    Parameters
    ----------
    group
        Its layers.
    weights
        Fraction of all weights compressed that are its own.
    without, alone
        Scores with everything but the group compressed, and with nothing else, ``[sequences]``.
    increase_without, increase_alone
        Nats per token above the dense model.
    recovery
        ``(all - without) / (all - dense)``: the part of the loss that goes when the group stays
        dense (arXiv 2307.08072 asks so of components).
    damage
        ``(alone - dense) / (all - dense)``: the part of the loss that the group makes by itself.
    """

    group: Group
    weights: float
    without: Array
    alone: Array
    increase_without: Interval
    increase_alone: Interval
    recovery: Share
    damage: Share

    def plain(self, judge: Judge) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.group.name,
            "kind": self.group.kind,
            "role": self.group.role,
            "layers": list(self.group.layers),
            "weights": self.weights,
            "without": self.without.tolist(),
            "alone": self.alone.tolist(),
            "perplexity_without": judge.perplexity(self.without),
            "perplexity_alone": judge.perplexity(self.alone),
            "increase_without": plain(self.increase_without),
            "increase_alone": plain(self.increase_alone),
            "recovery": self.recovery.plain(),
            "damage": self.damage.plain(),
        }


@dataclass(frozen=True)
class GroupsResult:
    """What all groups do; ``dense`` and ``everything`` are scores, ``[sequences]``.

    ``how`` says how variants were made.
    """

    judge: Judge
    dense: Array
    everything: Array
    increase: Interval
    rows: list[GroupRow]
    how: str

    @property
    def resolved(self) -> bool:
        """Whether the whole loss is told from 0; else fractions of it mean nothing."""
        return self.increase.excludes_zero

    def plain(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "how": self.how,
            "tokens": self.judge.tokens.tolist(),
            "dense": self.dense.tolist(),
            "all": self.everything.tolist(),
            "perplexity_dense": self.judge.perplexity(self.dense),
            "perplexity_all": self.judge.perplexity(self.everything),
            "increase": plain(self.increase),
            "groups": [row.plain(self.judge) for row in self.rows],
        }


def probe_groups(
    compressed: Compressed,
    judge: Judge,
    groups: Sequence[Group],
    *,
    recompress: bool = False,
    progress: bool = True,
) -> GroupsResult:
    """Score the model with all but one group compressed, and with only that one.

    Parameters
    ----------
    compressed
        The recipe, done to a twin of the model.
    groups
        Groups of its layers.
    recompress
        Compress anew for every variant, also where weights can be exchanged.
    """
    names = [layer.name for layer in compressed.layers]
    scores: dict[frozenset[str], Array] = {}
    bar = tqdm(total=2 * len(groups) + 2, desc="sensitivity, models", disable=not progress)

    def score(chosen: Collection[str]) -> Array:
        key = frozenset(chosen)
        if key not in scores:
            scores[key] = judge.score(compressed.variant(key, anew=recompress))
        bar.update()
        return scores[key]

    with left_as_found(compressed.dense), shared_statistics(), bar:
        dense, everything = score(()), score(names)
        pairs = [
            (score([name for name in names if name not in group.layers]), score(group.layers))
            for group in groups
        ]
    sizes = {x.name: x.shape[0] * x.shape[1] for x in compressed.layers}
    total = sum(sizes.values())
    loss = everything - dense
    rows = [
        GroupRow(
            group,
            sum(sizes[name] for name in group.layers) / total,
            without,
            alone,
            judge.increase(without, dense),
            judge.increase(alone, dense),
            judge.share(everything - without, loss),
            judge.share(alone - dense, loss),
        )
        for group, (without, alone) in zip(groups, pairs, strict=True)
    ]
    how = compressed.how
    if recompress and how == EXCHANGED:
        how = f"{RECOMPRESSED} for each, as asked"
    return GroupsResult(judge, dense, everything, judge.increase(everything, dense), rows, how)
