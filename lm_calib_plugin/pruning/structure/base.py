"""Common part of the methods that take whole parts out of a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.part import make_part, part_text
from lm_calib_plugin.pruning.masks import removed_count
from lm_calib_plugin.pruning.structure.recovery import Recovery
from lm_calib_plugin.stages import NONE
from lm_calib_plugin.statistics import LayerStats

BLOCK = "block"


class StructuralMethod(Method):
    """A method that looks at the whole model at once instead of one weight at a time."""

    kind: ClassVar[str] = "pruning"
    # Of hidden states and losses of the whole model; nothing that a layer alone could give.
    statistic: ClassVar[str] = "model"
    scope: ClassVar[str] = "model"
    unit: ClassVar[Literal["depth", "width"]]

    def compress(
        self, weight: Tensor, stats: LayerStats | None, dtype: torch.dtype = torch.float32
    ) -> LayerResult:
        """Raise: there is nothing to be done to one weight alone."""
        raise TypeError(f"{type(self).__name__} works on whole models, not on one weight")


@dataclass(frozen=True)
class DepthMethod(StructuralMethod):
    """A method that ranks decoder blocks, or their attention or MLP, and removes the lowest.

    Parameters
    ----------
    blocks
        How many are removed.
    sparsity
        Instead: fraction of them that is removed, rounded down.
    update
        What stands in for removed parts; None: nothing.

    Class attributes
    ----------------
    measure
        ``distance``: how far hidden states move; ``loss``: the loss without the part.
    contiguous
        Whether a run of consecutive blocks is removed; then only the last token of every sequence
        is looked at.
    ranking
        Raised whenever the ranking changes; part of ``revision``.
    """

    unit: ClassVar[Literal["depth", "width"]] = "depth"
    measure: ClassVar[Literal["distance", "loss"]] = "distance"
    contiguous: ClassVar[bool] = False
    ranking: ClassVar[int] = 1
    blocks: int | None = None
    sparsity: float | None = None
    update: Recovery | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make the method from recipe options; the update is a text such as ``lowrank?rank=4``."""
        return cls(**{**options, "update": make_part("update", options.get("update", NONE))})

    def options(self) -> dict[str, Any]:
        """Return every option, the update as text with its defaults filled in."""
        return {**super().options(), "update": part_text("update", self.update)}

    @property
    def revision(self) -> str:  # type: ignore[override]
        """Revisions of the ranking and of the update."""
        return ".".join(str(n) for n in (self.ranking, getattr(self.update, "revision", 0)))

    @property
    def inert(self) -> tuple[str, ...]:  # type: ignore[override]
        """``propagate``, as long as nothing is fitted behind a removed part."""
        return () if self.update is not None else ("propagate",)

    @property
    def sublayer_kind(self) -> str:
        """What is removed: ``block``, ``attention`` or ``mlp``."""
        return str(getattr(self, "sublayer", BLOCK))

    @property
    def does_nothing(self) -> bool:
        """Whether nothing is to be removed."""
        return not self.blocks and not self.sparsity

    def count(self, depth: int) -> int:
        """Return how many of ``depth`` parts are removed.

        Raises
        ------
        UserError
            When none would stay.
        """
        found = self.blocks
        if found is None:
            found = removed_count(depth, self.sparsity or 0.0)
        if found >= depth:
            raise UserError(
                "blocks",
                f"got {found}, the model has {depth}",
                "at least one has to stay",
                f"use blocks<={depth - 1}",
            )
        return found

    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        """Return how far every hidden state moves, ``[rows]`` in float32.

        Parameters
        ----------
        before, after
            ``[rows, hidden]``, any float dtype.
        """
        raise NotImplementedError

    def choose(self, values: Sequence[float], count: int) -> list[int]:
        """Return the ``count`` parts of the lowest value, in order; of ties, earlier ones go."""
        order = sorted(range(len(values)), key=lambda i: (values[i], i))
        return sorted(order[:count])


@dataclass(frozen=True)
class WidthMethod(StructuralMethod):
    """A method that removes attention heads and neurons.

    Parameters
    ----------
    sparsity
        Fraction of the parameters of all heads and neurons that is removed.
    """

    unit: ClassVar[Literal["depth", "width"]] = "width"
    inert: ClassVar[tuple[str, ...]] = ("propagate",)
    sparsity: float = 0.2

    @property
    def does_nothing(self) -> bool:
        """Whether nothing is to be removed."""
        return self.sparsity == 0

    @abstractmethod
    def unit_scores(self, weight: Tensor, variance: Tensor, width: int, attention: bool) -> Tensor:
        """Return the importance of every unit of one output projection, ``[units]``.

        Parameters
        ----------
        weight
            ``[out, in]``, the projection that reads the units.
        variance
            Of each of its inputs, ``[in]``.
        width
            Consecutive inputs that make one unit.
        attention
            Whether the units are heads, else neurons.
        """
        ...

    @abstractmethod
    def choose(self, scores: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Return which units are removed, one boolean ``[units]`` for each entry of ``scores``.

        Parameters
        ----------
        scores
            What :meth:`unit_scores` returned for every projection of the model.
        sizes
            Parameters of one unit of each projection.
        """
        ...

    @abstractmethod
    def compensation(self, weight: Tensor, mean: Tensor, removed: Tensor) -> Tensor:
        """Return what is added to the bias, ``[out]``; ``mean`` and ``removed`` are ``[in]``."""
        ...


def chord(before: Tensor, after: Tensor) -> Tensor:
    """Return the distance of rows scaled to length 1, ``[rows]``: ``sqrt(2 - 2 cos)``.

    Of nearly parallel rows the cosine itself keeps no digit of what parts it from 1; this does.
    Norms are taken in float32, where squares of large activations do not overflow. Two rows of
    zeros are equal; one alone is at a right angle to everything.
    """
    before, after = before.float(), after.float()
    sizes = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (before, after)]
    tiny = torch.finfo(torch.float32).tiny
    found = torch.linalg.vector_norm(
        before / sizes[0].clamp_min(tiny) - after / sizes[1].clamp_min(tiny), dim=-1
    )
    alone = (sizes[0] == 0).squeeze(-1) ^ (sizes[1] == 0).squeeze(-1)
    return torch.where(alone, torch.full_like(found, 2**0.5), found)


def relative_change(before: Tensor, after: Tensor, power: float) -> Tensor:
    """Return ``||after - before||_p / ||before||_p`` of every row, ``[rows]``, in float32."""
    before, after = before.float(), after.float()
    size = torch.linalg.vector_norm(before, power, dim=-1)
    moved = torch.linalg.vector_norm(after - before, power, dim=-1)
    return moved / size.clamp_min(torch.finfo(torch.float32).tiny)
