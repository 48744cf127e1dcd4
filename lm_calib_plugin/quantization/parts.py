"""The parts of a quantization method: transform, grid rule, rounding, observer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lm_calib_plugin.method import LayerResult
from lm_calib_plugin.part import Part
from lm_calib_plugin.quantization.grids import Grid, GridSpec
from lm_calib_plugin.statistics import LayerStats


@dataclass(frozen=True)
class Setting:
    """Options that several roundings share.

    Parameters
    ----------
    damp
        Ridge added to the Gram matrix, relative to its mean diagonal; None: the one of a few
        values with the smallest error on the sequences held out.
    act_order
        Visit columns by falling diagonal of the Gram matrix.
    compat
        ``reference``: weights of inputs that were always zero are set to zero beforehand.
    """

    damp: float | None = 0.01
    act_order: bool = True
    compat: str | None = None


class GridRule(Part):
    """Decides how much of the range of a group of weights the levels span."""

    stage: ClassVar[str] = "grid"

    def applies_to(self, layer: str) -> bool:
        """Return whether the range of a layer, by its name in the model, is looked at."""
        return True

    @abstractmethod
    def fit(
        self, weight: Tensor, spec: GridSpec, stats: LayerStats | None, dtype: torch.dtype
    ) -> Grid:
        """Return the grid of one weight.

        Parameters
        ----------
        weight
            ``[out, in]``, float32; not changed.
        spec
            Kind of number, width, groups.
        stats
            Statistics of the input of the kind ``statistic``.
        dtype
            What scales are stored in.
        """
        ...


class Rounding(Part):
    """Brings the weights of one layer to levels of its grid."""

    stage: ClassVar[str] = "rounding"
    # "layer", or "block": all layers of a decoder block are rounded together.
    level: ClassVar[str] = "layer"
    # Whether `act_order` changes what the part does.
    uses_order: ClassVar[bool] = False
    # Whether the Gram matrix lets a layer make up for the error of earlier blocks.
    corrects: ClassVar[bool] = False
    # Whether a weight of zero stays zero.
    keeps_zeros: ClassVar[bool] = True
    # Whether zero points are any numbers, so that 0 need not be a level.
    real_zeros: ClassVar[bool] = False
    permutation_safe: ClassVar[bool] = False

    def check(self, spec: GridSpec) -> None:
        """Raise a :class:`~lm_calib_plugin.errors.UserError` for grids it cannot round to."""
        return None

    def prepared(self, weight: Tensor, stats: LayerStats | None, setting: Setting) -> Tensor:
        """Return the weight ``[out, in]`` to which a grid is fitted; the one that is rounded."""
        return weight

    @abstractmethod
    def round(
        self, weight: Tensor, grid: Grid, stats: LayerStats | None, setting: Setting
    ) -> LayerResult:
        """Round one weight; the result carries the grid on which it lies.

        Parameters
        ----------
        weight
            ``[out, in]``, float32; not changed.
        grid
            Fitted to this weight by the grid rule.
        stats, setting
            Statistics of the input of the kind ``statistic``, and the shared options.
        """
        ...

    def round_kept(
        self,
        weight: Tensor,
        keep: Tensor,
        grid: Grid,
        stats: LayerStats | None,
        setting: Setting,
    ) -> LayerResult:
        """Round the weights of a mask ``keep`` (``[out, in]``, bool); the others become zero.

        A rounding that makes up for its errors makes up for what is removed, too.
        """
        zero = torch.zeros_like(weight)
        return self.round(torch.where(keep, weight, zero), grid, stats, setting)

    def round_together(
        self,
        weights: Sequence[Tensor],
        grids: Sequence[Grid],
        stats: LayerStats | None,
        setting: Setting,
        keeps: Sequence[Tensor] | None = None,
    ) -> list[LayerResult]:
        """Round layers that share an input; the results are those of one after the other.

        ``keeps`` are masks, as for :meth:`round_kept`; None: nothing is removed.
        """
        pairs = zip(weights, grids, strict=True)
        if keeps is None:
            return [self.round(weight, grid, stats, setting) for weight, grid in pairs]
        masked = zip(weights, keeps, grids, strict=True)
        return [self.round_kept(*each, stats, setting) for each in masked]


class BlockProblem(Protocol):
    """One decoder block whose layers are rounded together; the engine makes it.

    ``weights`` are the dense weights by name, ``[out, in]``, float32. ``sequences`` is the number
    of calibration sequences, ``heldout`` that of the sequences kept out.
    """

    weights: Mapping[str, Tensor]
    sequences: int
    heldout: int

    def loss(
        self, weights: Mapping[str, Tensor], sequences: Sequence[int], heldout: bool = False
    ) -> Tensor:
        """Return the mean squared difference of the block's output from that of the dense block.

        A scalar, differentiable in ``weights`` (every name of ``weights``, ``[out, in]``).
        ``sequences`` are indices below ``self.sequences`` (or ``self.heldout``). Pads do not count.
        """
        ...


class BlockRounding(Rounding):
    """A rounding that sees a whole decoder block at once."""

    level: ClassVar[str] = "block"
    keeps_zeros: ClassVar[bool] = False

    @abstractmethod
    def round_block(
        self, problem: BlockProblem, grids: Mapping[str, Grid], progress: bool = True
    ) -> dict[str, LayerResult]:
        """Round every layer of a block.

        Parameters
        ----------
        problem
            The block.
        grids
            Grids of all its layers, by name, as fitted by the grid rule.
        progress
            Whether a bar is shown.
        """
        ...


class Transform(Part):
    """Changes the model without changing what it computes, so that it rounds better."""

    stage: ClassVar[str] = "transform"
    # "inputs": input channels of layers are scaled; "model": the whole model at once.
    level: ClassVar[str] = "inputs"


@dataclass(frozen=True, eq=False)
class Scaling:
    """Factors of the input channels of some layers, and how they were found.

    Parameters
    ----------
    factors
        ``[in]``, float32, positive.
    chosen
        What was chosen on the data, by name; empty when nothing was searched.
    before, after
        What the search made small, without and with the factors; None when nothing was searched.
    """

    factors: Tensor
    chosen: Mapping[str, float] = field(default_factory=dict)
    before: float | None = None
    after: float | None = None


class InputScaling(Transform):
    """Multiplies columns of weights by ``s`` and divides what comes in by ``s``.

    ``feeds`` says which inputs: ``norm`` (those that come from a norm) or ``all`` (also those that
    come from another linear layer).
    """

    feeds: ClassVar[str] = "all"

    @abstractmethod
    def scales(
        self,
        weights: Sequence[Tensor],
        stats: LayerStats,
        rounded: Callable[[int, Tensor], Tensor],
        activations: Callable[[Tensor], Tensor] | None,
        tie: Callable[[Tensor], Tensor],
    ) -> Scaling:
        """Return the factors ``s`` of the columns of the weights.

        Parameters
        ----------
        weights
            Weights ``[out_i, in]`` of all layers that read this input, float32; not changed.
        stats
            Statistics of the input of the kind ``statistic``.
        rounded
            ``rounded(i, w)`` is what a changed ``weights[i]`` becomes on a grid of its own, rounded
            to nearest.
        activations
            Quantizes input rows ``[tokens, in]``; None where the inputs stay as they are.
        tie
            Averages values ``[in]`` over the channels that must share a factor; the factors are
            tied before they are used, so a search has to look at tied ones.
        """
        ...


class Observer(Part):
    """Chooses the range of the values of an activation that the levels span."""

    stage: ClassVar[str] = "observer"

    @abstractmethod
    def limit(self, ranges: Any, spec: Any) -> float:
        """Return the largest absolute value that is represented, positive.

        Parameters
        ----------
        ranges
            :class:`~lm_calib_plugin.statistics.ranges.Ranges` of the input.
        spec
            :class:`~lm_calib_plugin.quantization.activations.ActivationSpec`: the levels.
        """
        ...
