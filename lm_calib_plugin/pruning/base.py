"""Common part of the pruning methods: strength, pattern, and score-then-select."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.pruning.masks import (
    keep_by_threshold,
    keep_highest,
    keep_n_of_m,
    removed_count,
)
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class PruningMethod(Method):
    """A method that removes weights.

    Parameters
    ----------
    sparsity
        Fraction removed; set by ``pattern`` when that is N:M.
    pattern
        ``unstructured`` or ``N:M`` (N kept).
    compat
        ``reference``: count as the paper's code does.
    """

    kind: ClassVar[str] = "pruning"
    sparsity: float = 0.5
    pattern: str = "unstructured"
    compat: str | None = None

    def __post_init__(self) -> None:
        if self.n_of_m:
            keep, group = self.n_of_m
            object.__setattr__(self, "sparsity", 1 - keep / group)

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """``(N, M)``, or None when unstructured."""
        if self.pattern == "unstructured":
            return None
        keep, group = self.pattern.split(":")
        return int(keep), int(group)

    @property
    def does_nothing(self) -> bool:
        """Whether nothing is to be removed."""
        return self.sparsity == 0

    def check_layer(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a layer whose width does not hold whole N:M groups."""
        if self.n_of_m and shape[1] % self.n_of_m[1]:
            raise UserError(
                "pattern",
                f"layer {name} has {shape[1]} inputs, not divisible by {self.n_of_m[1]}",
                fix=f"exclude it (ignore={name}) or use an unstructured pattern",
            )


class ScorePruning(PruningMethod):
    """Score every weight, remove the lowest of each comparison group, change nothing else.

    ``group`` is ``layer`` (all weights of the matrix) or ``row`` (the inputs of one output).
    """

    group: ClassVar[str]

    @abstractmethod
    def scores(self, weight: Tensor, stats: LayerStats | None) -> Tensor:
        """Return the importance of every weight, ``[out, in]``, non-negative."""
        ...

    def keep_mask(self, weight: Tensor, stats: LayerStats | None) -> Tensor:
        """Return the boolean mask of the weights that stay, ``[out, in]``."""
        scores = self.scores(weight, stats)
        if self.n_of_m:
            return keep_n_of_m(scores, *self.n_of_m)
        groups = scores.reshape(1, -1) if self.group == "layer" else scores
        if self.compat == "reference" and self.group == "layer":
            mask = keep_by_threshold(groups, self.sparsity)
        else:
            mask = keep_highest(groups, removed_count(groups.shape[1], self.sparsity))
        return mask.reshape(weight.shape)

    def compress(
        self, weight: Tensor, stats: LayerStats | None, dtype: torch.dtype = torch.float32
    ) -> LayerResult:
        """Set the removed weights to exactly zero."""
        mask = self.keep_mask(weight, stats)
        return LayerResult(torch.where(mask, weight, torch.zeros_like(weight)))
