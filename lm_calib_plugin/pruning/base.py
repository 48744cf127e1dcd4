"""Common part of the pruning methods: strength and pattern."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import Method


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
    sparsity: float | Fraction = 0.5
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
