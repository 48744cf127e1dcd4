"""The parts of a pruning method: a score, a refinement of the mask, an update of what is kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.part import Part
from lm_calib_plugin.pruning.masks import (
    keep_by_threshold,
    keep_highest,
    keep_n_of_m,
    removed_count,
)
from lm_calib_plugin.statistics import LayerStats

GROUPS = ("row", "layer", "block128")
BLOCK = 128


@dataclass(frozen=True)
class Strength:
    """How much of one layer goes, and by which rules.

    Parameters
    ----------
    sparsity
        Fraction removed; an exact fraction when it was counted.
    n_of_m
        ``(N, M)``: N kept of every M consecutive inputs; None: unstructured.
    group
        Weights that are compared with each other: ``row``, ``layer`` or ``block128`` (all rows of
        128 columns); None: as the score defines.
    compat
        ``reference``: count as the papers' code does.
    damp
        Ridge added to the Gram matrix, relative to its mean diagonal.
    """

    sparsity: float | Fraction
    n_of_m: tuple[int, int] | None = None
    group: str | None = None
    compat: str | None = None
    damp: float = 0.01

    @property
    def reference(self) -> bool:
        """Whether the rules of the papers' code are asked for."""
        return self.compat == "reference"

    def keep(self, scores: Tensor, group: str) -> Tensor:
        """Return the mask of the weights that stay.

        Parameters
        ----------
        scores
            Importance of every weight, ``[out, in]``.
        group
            Comparison group of the score, unless another one was asked for.

        Returns
        -------
        Boolean mask ``[out, in]`` with exactly ``floor(size * sparsity)`` weights removed from
        every group (with ``compat=reference``, at least one more unless groups are rows).
        """
        if self.n_of_m:
            return keep_n_of_m(scores, *self.n_of_m)
        group = self.group or group
        if group == "row":
            return keep_highest(scores, removed_count(scores.shape[1], self.sparsity))
        width = BLOCK if group == "block128" else scores.shape[1]
        return torch.cat([self.keep_all(part) for part in scores.split(width, dim=1)], dim=1)

    def keep_all(self, scores: Tensor) -> Tensor:
        """Return the mask of what stays when all scores, ``[out, in]``, are one group."""
        one = scores.reshape(1, -1)
        if self.reference:
            mask = keep_by_threshold(one, float(self.sparsity))
        else:
            mask = keep_highest(one, removed_count(one.shape[1], self.sparsity))
        return mask.reshape(scores.shape)


@dataclass
class Selection:
    """What is known of a layer after a stage.

    ``keep`` is the mask ``[out, in]``; ``weight`` the values found so far on that mask (None: those
    of the dense layer), ``solved`` the name of the update that would arrive at them. ``bias`` is
    to be added to the bias of the layer, ``[out]``. ``damp`` is the largest ridge that was used.
    """

    keep: Tensor
    weight: Tensor | None = None
    solved: str = ""
    bias: Tensor | None = None
    damp: float | None = None
    notes: tuple[str, ...] = ()

    def values(self, dense: Tensor) -> Tensor:
        """Return the weights found so far, zero off the mask, ``[out, in]``."""
        found = dense if self.weight is None else self.weight
        return torch.where(self.keep, found, torch.zeros_like(found))

    def damped(self, damp: float) -> float:
        """Return the larger one of a ridge and that used so far."""
        return max(self.damp or 0.0, damp)

    def but(self, **changes: Any) -> Selection:
        """Return a copy with some fields changed."""
        return replace(self, **changes)


class Score(Part):
    """Decides which weights stay.

    ``group`` is the comparison group of the paper: ``row``, ``layer`` or ``block128``.
    """

    stage: ClassVar[str] = "score"
    group: ClassVar[str] = "row"
    # Whether a score is a product of whole tensors, so that moments may differ from row to row.
    elementwise: ClassVar[bool] = False
    # Whether scores of several layers, with moments per token, are on one scale.
    comparable: ClassVar[bool] = False

    def scores(self, weight: Tensor, stats: LayerStats | None) -> Tensor:
        """Return the importance of every weight, ``[out, in]``, non-negative.

        A score that selects in a way of its own does without.

        Parameters
        ----------
        weight
            ``[out, in]``, float32; not changed.
        stats
            Statistics of the layer's input of the kind ``statistic``; not changed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no scores apart from its selection")

    def select(self, weight: Tensor, stats: LayerStats | None, strength: Strength) -> Selection:
        """Return the mask of the weights with the highest scores of each group."""
        return Selection(strength.keep(self.scores(weight, stats), self.group))

    def select_together(
        self, weights: Sequence[Tensor], stats: LayerStats | None, strength: Strength
    ) -> list[Selection]:
        """Select in layers that share an input; the results are those of one after the other."""
        return [self.select(weight, stats, strength) for weight in weights]


class Refinement(Part):
    """Moves what is removed, at the same count in every group."""

    stage: ClassVar[str] = "refine"

    def applies_to(self, layer: str, strength: Strength) -> bool:
        """Return whether the mask of a layer, by its name in the model, is refined at all."""
        return True

    @abstractmethod
    def refine(
        self,
        weight: Tensor,
        selection: Selection,
        stats: LayerStats | None,
        strength: Strength,
    ) -> Selection:
        """Return a selection with a better mask.

        Parameters
        ----------
        weight
            The dense weight, ``[out, in]``, float32; not changed.
        selection
            What the score chose; not changed.
        stats, strength
            As for a score.
        """
        ...

    def refine_together(
        self,
        weights: Sequence[Tensor],
        selections: Sequence[Selection],
        stats: LayerStats | None,
        strength: Strength,
    ) -> list[Selection]:
        """Refine layers that share an input; the results are those of one after the other."""
        pairs = zip(weights, selections, strict=True)
        return [self.refine(weight, found, stats, strength) for weight, found in pairs]


class Update(Part):
    """Gives the kept weights new values."""

    stage: ClassVar[str] = "update"
    # Whether the values are those of an OBS sweep over the mask.
    sweeps: ClassVar[bool] = False

    @abstractmethod
    def update(
        self,
        weight: Tensor,
        selection: Selection,
        stats: LayerStats | None,
        strength: Strength,
    ) -> Selection:
        """Return a selection whose ``weight`` (or ``bias``) makes up for what is removed.

        Arguments as for a refinement.
        """
        ...

    def update_together(
        self,
        weights: Sequence[Tensor],
        selections: Sequence[Selection],
        stats: LayerStats | None,
        strength: Strength,
    ) -> list[Selection]:
        """Update layers that share an input; the results are those of one after the other."""
        pairs = zip(weights, selections, strict=True)
        return [self.update(weight, found, stats, strength) for weight, found in pairs]
