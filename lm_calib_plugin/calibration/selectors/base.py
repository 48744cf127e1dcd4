"""What a selector is: it picks ``count`` sequences of a pool, by what it declares it needs.

A third party adds a selector by installing a class and an entry point in the group
``lm_calib_plugin.selection``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from lm_calib_plugin.calibration.selectors.features import Features


class Selector(ABC):
    """Base of every selector.

    ``needs`` names the features read, of :data:`~.features.NEEDS`; an empty set means that no
    model is needed. ``takes_target`` says whether sequences of ``select_target`` are compared
    with.

    Attributes
    ----------
    facts
        Plain values for the record, filled by :meth:`select`.
    warnings
        What the user should know of this choice, filled by :meth:`select`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    takes_target: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.warnings: list[str] = []

    @abstractmethod
    def select(
        self, candidates: Sequence[Tensor], count: int, features: Features, seed: int
    ) -> list[int]:
        """Return ``count`` different places in ``candidates``, in order of choice.

        Parameters
        ----------
        candidates
            int64 ids, one tensor of one dimension each; at least ``count``.
        features
            What one pass of the dense model tells of each candidate.
        seed
            Of everything drawn.
        """
