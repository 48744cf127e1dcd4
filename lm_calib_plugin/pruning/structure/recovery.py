"""What stands in for a removed part: its mean, or a low-rank linear map fitted to it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.part import Part
from lm_calib_plugin.statistics.joint import JointMoments


@dataclass(frozen=True)
class Term:
    """The map ``x -> up (down x) + shift``; ``down`` and ``up`` are None for a constant.

    ``shift`` is ``[out]``, ``down`` ``[rank, in]``, ``up`` ``[out, rank]``, all float64.
    """

    shift: Tensor
    down: Tensor | None = None
    up: Tensor | None = None


@dataclass(frozen=True)
class Recovery(Part):
    """Fits a :class:`Term` to inputs and outputs of a removed part.

    ``products`` tells whether their covariances are needed.
    """

    stage: ClassVar[str] = "update"
    scope: ClassVar[str] = "model"
    statistic: ClassVar[str] = "model"
    products: ClassVar[bool]

    @abstractmethod
    def fit(self, moments: JointMoments) -> Term:
        """Return the term; ``moments`` are those of input and output of the removed part."""
        ...


@dataclass(frozen=True)
class MeanUpdate(Recovery):
    """The mean of what was removed, ``E[y]`` (Siddiqui et al.)."""

    products: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.16286"

    def fit(self, moments: JointMoments) -> Term:
        """Return the mean output."""
        return Term(moments.mean_output.clone())


@dataclass(frozen=True)
class LowRankUpdate(Recovery):
    """The best linear map of low rank: ridge regression of y on x, then a truncated SVD.

    The ridge is relative to the variance of each input, so that a few huge channels do not silence
    the others. The SVD is that of the fitted outputs, which is the best choice of a rank in terms
    of output error.

    Parameters
    ----------
    rank
        Rank of the map.
    ridge
        Relative to the variance of each input channel.
    """

    products: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.16286"
    rank: int = 8
    ridge: float = 0.01

    def __post_init__(self) -> None:
        self.at_least("rank", 1)
        self.at_least("ridge", 0)

    def fit(self, moments: JointMoments) -> Term:
        """Return shift and factors.

        Raises
        ------
        NumericalError
            When the moments of the input can not be factored.
        """
        inner, cross = moments.covariance(), moments.cross_covariance()
        scale = inner.diagonal().sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        normal = inner / scale[:, None] / scale[None, :]
        normal.diagonal().add_(self.ridge)
        # Channels that never change have a zero row; any solution will do there.
        normal.diagonal()[inner.diagonal() <= 0] = 1.0
        lower, failed = torch.linalg.cholesky_ex(normal)
        if failed.item():
            raise NumericalError(
                "low-rank update", "ridge regression", "singular", "raise ridge, or use more tokens"
            )
        # With z = x / scale: half = Cyz L^-T, so that half half^T is that of the fitted outputs.
        half = torch.linalg.solve_triangular(lower, (cross / scale[None, :]).t(), upper=False).t()
        left, _, _ = torch.linalg.svd(half, full_matrices=False)
        up = left[:, : self.rank]
        whole = torch.linalg.solve_triangular(lower.t(), half.t(), upper=True).t()
        down = (up.t() @ whole) / scale[None, :]
        shift = moments.mean_output - up @ (down @ moments.mean_input)
        return Term(shift, down, up)
