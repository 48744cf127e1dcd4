"""A pruning method as a point in the grid: score, then refine the mask, then update the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.method import LayerResult
from lm_calib_plugin.part import Part, make_part, part_text
from lm_calib_plugin.pruning.allocations.base import Allocation
from lm_calib_plugin.pruning.base import PruningMethod
from lm_calib_plugin.pruning.parts import GROUPS, Refinement, Score, Strength, Update
from lm_calib_plugin.registry import PRUNING_STAGES
from lm_calib_plugin.stages import NONE
from lm_calib_plugin.statistics import LayerStats, statistic_of


@dataclass(frozen=True)
class Pipeline(PruningMethod):
    """Score every weight, refine the mask, update what is kept.

    Parameters
    ----------
    group
        Weights compared with each other: ``row``, ``layer`` or ``block128``; None: as the score
        defines.
    damp
        Ridge of the parts that use the Gram matrix, relative to its mean diagonal.
    correction
        Part of the error of earlier blocks that a layer makes up for, 0 to 1.
    allocation
        How much goes from which layer; whoever knows all layers makes a pipeline for each of it.
        None: from each the same fraction.
    score, refine, update
        The parts; None: that stage does nothing.
    """

    kind: ClassVar[str] = "pruning"
    group: str | None = None
    damp: float = 0.01
    correction: float = 0.0  # type: ignore[misc]
    allocation: Allocation | None = None
    score: Score | None = None
    refine: Refinement | None = None
    update: Update | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score is None:
            raise ValueError("a pruning method needs a score")
        if self.group is not None and self.group not in GROUPS:
            raise UserError("group", f"got {self.group!r}", f"allowed: {listed(GROUPS)}")
        if self.correction and "gram" not in self.statistic:
            raise UserError(
                "correction",
                f"got {self.correction:g}",
                "methods that use the Gram matrix of the inputs",
                "add update=pcg or update=obs, or correction=0",
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make the method from recipe options; stages are texts such as ``swap?steps=50``."""
        stages = {
            name: make_part(name, text) for name, text in options.items() if name in PRUNING_STAGES
        }
        return cls(**{**options, **stages})

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that do something, in order."""
        return tuple(p for p in (self.score, self.refine, self.update) if p is not None)

    def options(self) -> dict[str, Any]:
        """Return every option that matters, stages as texts with their defaults filled in."""
        plain: dict[str, Any] = {
            "sparsity": float(self.sparsity),
            "pattern": self.pattern,
            "compat": self.compat,
            "group": self.group,
        }
        if any(part.uses_damp for part in self.parts):
            plain["damp"] = self.damp
        if self.correction:
            plain["correction"] = self.correction
        return plain | {name: part_text(name, getattr(self, name)) for name in PRUNING_STAGES}

    @property
    def label(self) -> str:
        """The names of the parts, such as ``sparsegpt+obs``."""
        names = ((name, getattr(self, name)) for name in PRUNING_STAGES)
        return "+".join(part_text(n, p).partition("?")[0] for n, p in names if p is not None)

    # --- what the parts say together ---------------------------------------------------------

    @property
    def statistic(self) -> str:  # type: ignore[override]
        """What has to be known of the inputs for all parts."""
        return statistic_of(part.statistic for part in self.parts)

    @property
    def rows_independent(self) -> bool:  # type: ignore[override]
        """Whether no stage lets an output row depend on the others."""
        return self._by_row and all(part.rows_independent for part in self.parts)

    @property
    def permutation_safe(self) -> bool:  # type: ignore[override]
        """Whether permuting output rows permutes the result."""
        return self.rows_independent

    @property
    def group_in_force(self) -> str:
        """The comparison group: of the allocation, as asked for, or that of the score."""
        assert self.score is not None
        if self.allocation is not None and self.allocation.whole_layer:
            return "layer"
        return self.group or self.score.group

    @property
    def _by_row(self) -> bool:
        return self.n_of_m is not None or self.group_in_force == "row"

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """Whether only a score that is a product of whole tensors is at work."""
        assert self.score is not None
        return self.score.elementwise and len(self.parts) == 1

    @property
    def inert(self) -> tuple[str, ...]:  # type: ignore[override]
        """``compat``, where rows are counted exactly in the papers' code, too; ``propagate``, where
        nothing is looked at while blocks are pruned."""
        counted = self._by_row and not any(part.uses_compat for part in self.parts)
        blind = self.statistic == NONE
        return ("compat",) * counted + ("propagate",) * blind

    def identity(self) -> dict[str, Any]:
        """Return the options with the comparison group that is in force."""
        return {**self.options(), "group": None if self.n_of_m else self.group_in_force}

    @property
    def needs_bias(self) -> bool:  # type: ignore[override]
        """Whether a part writes into the bias of a layer."""
        return any(part.needs_bias for part in self.parts)

    @property
    def uses_heldout(self) -> bool:  # type: ignore[override]
        """Whether a part looks at the statistics of sequences held out."""
        return any(part.uses_heldout for part in self.parts)

    @property
    def revision(self) -> str:  # type: ignore[override]
        """Revisions of the parts, in order."""
        parts = (self.allocation, self.score, self.refine, self.update)
        return ".".join(str(getattr(part, "revision", 0)) for part in parts)

    # --- work ----------------------------------------------------------------------------------

    @property
    def strength(self) -> Strength:
        """How much of a layer goes, for the parts."""
        return Strength(self.sparsity, self.n_of_m, self.group, self.compat, self.damp)

    def for_layer(self, name: str) -> Self:
        """Return the method without a refinement that leaves this layer out."""
        if self.refine is None or self.refine.applies_to(name, self.strength):
            return self
        return replace(self, refine=None)

    def compress(
        self, weight: Tensor, stats: LayerStats | None, dtype: torch.dtype = torch.float32
    ) -> LayerResult:
        """Prune one weight ``[out, in]``; removed weights are exactly zero."""
        return self.compress_together([weight], stats, dtype)[0]

    def compress_together(
        self,
        weights: Sequence[Tensor],
        stats: LayerStats | None,
        dtype: torch.dtype = torch.float32,
    ) -> list[LayerResult]:
        """Prune weights that share an input; parts factor its Gram matrix once for all."""
        assert self.score is not None
        for part in self.parts:
            if part.statistic != NONE and stats is None:
                raise ValueError(f"{type(part).__name__} needs statistics of the inputs")
        strength = self.strength
        found = self.score.select_together(weights, stats, strength)
        if self.refine is not None:
            found = self.refine.refine_together(weights, found, stats, strength)
        if self.update is not None:
            found = self.update.update_together(weights, found, stats, strength)
        else:
            # What a score computes on its way is no update unless one is asked for.
            found = [one.but(weight=None) for one in found]
        return [
            LayerResult(one.values(weight), damp=one.damp, notes=one.notes, bias=one.bias)
            for weight, one in zip(weights, found, strict=True)
        ]
