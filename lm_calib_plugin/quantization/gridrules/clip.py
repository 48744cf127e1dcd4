"""Clip: the range of each group whose rounding changes the layer's output least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.gridrules.search import RangeSearch
from lm_calib_plugin.quantization.grids import Grid, GridSpec
from lm_calib_plugin.statistics import LayerStats, gram_in

NOTHING = "none"


@dataclass(frozen=True)
class Clip(RangeSearch):
    """Shrink each range to where the group's squared output error is smallest.

    The clip search of AWQ (arXiv 2306.00978): the error of a rounding difference ``d`` of a group
    of a row is ``d G_gg d^T`` with the group's block ``G_gg`` of the Gram matrix, that is the sum
    over all tokens of ``(d x_g)^2``; what the groups do to each other is not looked at.

    Notes
    -----
    The authors' code draws 512 tokens, tries 1, 0.95, ... 0.55, and fits the grid anew to the
    clipped weights. Here all tokens count, the range goes down to 0.5, and both of its ends
    shrink by the same factor.

    Parameters
    ----------
    steps, low
        See :class:`~lm_calib_plugin.quantization.gridrules.search.RangeSearch`.
    skip
        Tails of layer names, joined by ``+``, whose whole range is kept, or ``none``. Clipping
        queries and keys changes the attention more than the error of the layer tells.
    """

    skip: str = "q_proj+k_proj"

    statistic: ClassVar[str] = "gram"
    rows_independent: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.00978"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(tail.strip() for tail in self.skip.split("+")):
            raise UserError(
                self.stage,
                f"got skip={self.skip!r}",
                "tails of layer names joined by +, or none",
                "for instance skip=q_proj+k_proj",
            )

    def applies_to(self, layer: str) -> bool:
        """Return whether no tail that is to be skipped ends the name of the layer."""
        tails = [] if self.skip == NOTHING else [t.strip() for t in self.skip.split("+")]
        return not any(f".{layer}".endswith(f".{tail}") for tail in tails)

    def fit(
        self, weight: Tensor, spec: GridSpec, stats: LayerStats | None, dtype: torch.dtype
    ) -> Grid:
        """Return the grid of one weight ``[out, in]``."""
        gram, width = gram_in(stats).to(weight.device), weight.shape[1]
        size = width if spec.group_size == -1 else spec.group_size
        parts = gram.reshape(width // size, size, width // size, size)
        blocks = parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

        def errors(difference: Tensor) -> Tensor:
            by_group = difference.transpose(0, 1)
            return (by_group @ blocks).mul_(by_group).sum(dim=-1).t()

        return self.best(weight, spec, dtype, errors)
