"""Rotation: outliers of the residual stream are spread over all channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lm_calib_plugin.quantization.parts import Transform


@dataclass(frozen=True)
class Rotation(Transform):
    """Merged rotations of the residual stream and of the values of attention.

    The whole model is rotated by random Hadamard matrices that are merged into its weights:
    R1 of the residual stream and R2 of the values of every key/value head, in the names of
    SpinQuant (Liu et al., 2405.16406), without learning them; those of QuaRot (Ashkboos et al.)
    that have to be computed in every forward pass are left out. The model remains a plain model of
    its architecture. No data is needed.

    Parameters
    ----------
    seed
        Chooses the random signs.
    r2
        Whether values are rotated, too.
    """

    level: ClassVar[str] = "model"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.00456"
    seed: int = 0
    r2: bool = True

    def __post_init__(self) -> None:
        self.at_least("seed", 0)
