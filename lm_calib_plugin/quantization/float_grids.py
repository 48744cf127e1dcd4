"""Grids of small floating point numbers: fp8, nvfp4 and mxfp4."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lm_calib_plugin.quantization.grids import Grid
from lm_calib_plugin.quantization.numbers import (
    E2M1_MAX,
    FP8_MAX,
    MXFP4_GROUP,
    NVFP4_GROUP,
    mxfp4_scale,
    nvfp4_factor,
    nvfp4_scale,
    round_e2m1,
    to_fp8,
)


@dataclass(frozen=True)
class FloatGrid(Grid):
    """``scale`` times the values of a floating point format, symmetric around zero.

    Parameters
    ----------
    group_size
        Consecutive inputs that share a scale.
    scale
        ``[out, groups]``, float32, positive.
    """

    group_size: int
    scale: Tensor

    # The largest value of the format, and half the distance from it to the one below.
    highest: ClassVar[float]
    half_step: ClassVar[float]
    # The only group size of the format; None: any, also a whole row.
    fixed_size: ClassVar[int | None] = None

    @classmethod
    @abstractmethod
    def fit(
        cls, weight: Tensor, group_size: int, dtype: torch.dtype, shrink: Tensor | None = None
    ) -> Self:
        """Fit the grid of a weight ``[out, in]``; arguments as of ``GridSpec.fit``."""
        ...

    @staticmethod
    @abstractmethod
    def values(x: Tensor) -> Tensor:
        """Round to the nearest values of the format, ties to even; a new tensor, float32."""
        ...

    def round(self, weight: Tensor) -> Tensor:
        """Round a weight ``[out, in]`` to the nearest levels."""
        scale = self.scale[..., None]
        rounded = self.values(self._groups(weight) / scale).mul_(scale)
        return rounded.reshape(weight.shape)

    def round_column(self, column: Tensor, group: int) -> Tensor:
        """Round one column ``[out]`` of a group to the nearest levels."""
        scale = self.scale[:, group]
        return self.values(column / scale).mul_(scale)

    def clipped(self, weight: Tensor) -> float:
        """Return the share of weights ``[out, in]`` more than half a step beyond the levels."""
        place = self._groups(weight).abs() / self.scale[..., None]
        # Scales are rounded to what their format holds, which moves the largest weight a little.
        return float((place > self.highest + 1.01 * self.half_step).float().mean())

    def _groups(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], -1, self.group_size)


@dataclass(frozen=True)
class FP8Grid(FloatGrid):
    """``scale * v`` with ``v`` an e4m3 value; ``scale = max|w| / 448`` per row or group.

    The scale is stored in ``dtype``, that of the model, as compressed-tensors does: the parameter
    that a loader makes for it has the model's dtype, so that a float32 scale would be rounded on
    the way and the weights would no longer be those that were measured.
    """

    dtype: torch.dtype = torch.float32

    number: ClassVar[str] = "fp8"
    bits = 8
    highest: ClassVar[float] = FP8_MAX
    half_step: ClassVar[float] = 16.0

    @classmethod
    def fit(
        cls, weight: Tensor, group_size: int, dtype: torch.dtype, shrink: Tensor | None = None
    ) -> Self:
        """Fit the scales of a weight ``[out, in]``; a group of zeros gets scale 1."""
        size = weight.shape[1] if group_size == -1 else group_size
        scale = _amax(weight, size, shrink) / FP8_MAX
        info = torch.finfo(dtype)
        stored = scale.to(dtype).float().clamp(min=info.smallest_normal * info.eps)
        return cls(size, torch.where(scale > 0, stored, torch.ones_like(scale)), dtype)

    @staticmethod
    def values(x: Tensor) -> Tensor:
        """Round to the nearest e4m3 values."""
        return to_fp8(x)

    def stored_bits(self, shape: tuple[int, int]) -> float:
        """Return the bits of values and scales of a weight ``(out, in)``."""
        return 8 * shape[0] * shape[1] + self.scale.numel() * 8 * self.dtype.itemsize


@dataclass(frozen=True)
class NVFP4Grid(FloatGrid):
    """``scale * v`` with ``v`` an e2m1 value; each 16 inputs have a scale of their own.

    ``scale`` is an e4m3 value over ``factor``, one number for the whole weight:
    ``448 * 6 / max|w|``, by which the largest scale is the largest e4m3 value.
    """

    factor: Tensor

    number: ClassVar[str] = "nvfp4"
    bits = 4
    highest: ClassVar[float] = E2M1_MAX
    half_step: ClassVar[float] = 1.0
    fixed_size: ClassVar[int | None] = NVFP4_GROUP

    @classmethod
    def fit(
        cls, weight: Tensor, group_size: int, dtype: torch.dtype, shrink: Tensor | None = None
    ) -> Self:
        """Fit the scales of a weight ``[out, in]``; ``shrink`` leaves the factor as it is."""
        largest = weight.abs().amax()
        scale = nvfp4_scale(_amax(weight, NVFP4_GROUP, shrink), largest)
        return cls(NVFP4_GROUP, scale, nvfp4_factor(largest))

    @property
    def stored_scale(self) -> Tensor:
        """The scales as they are stored, e4m3 values, ``[out, groups]``, float32."""
        return to_fp8(self.scale * self.factor)

    @staticmethod
    def values(x: Tensor) -> Tensor:
        """Round to the nearest e2m1 values."""
        return round_e2m1(x)

    def stored_bits(self, shape: tuple[int, int]) -> float:
        """Return the bits of values, scales (8 each) and the factor (32)."""
        return 4 * shape[0] * shape[1] + 8 * self.scale.numel() + 32


@dataclass(frozen=True)
class MXFP4Grid(FloatGrid):
    """``scale * v`` with ``v`` an e2m1 value; each 32 inputs share a power of two.

    By the rule of the OCP Microscaling Formats specification, ``2^(floor(log2 max|w|) - 2)``;
    weights between 6 and 8 times the scale become 6 times the scale.
    """

    number: ClassVar[str] = "mxfp4"
    bits = 4
    highest: ClassVar[float] = E2M1_MAX
    half_step: ClassVar[float] = 1.0
    fixed_size: ClassVar[int | None] = MXFP4_GROUP

    @classmethod
    def fit(
        cls, weight: Tensor, group_size: int, dtype: torch.dtype, shrink: Tensor | None = None
    ) -> Self:
        """Fit the scales of a weight ``[out, in]``; ``shrink`` acts before the rounding down."""
        return cls(MXFP4_GROUP, mxfp4_scale(_amax(weight, MXFP4_GROUP, shrink)))

    @staticmethod
    def values(x: Tensor) -> Tensor:
        """Round to the nearest e2m1 values."""
        return round_e2m1(x)

    def stored_bits(self, shape: tuple[int, int]) -> float:
        """Return the bits of values and scales (8 each) of a weight ``(out, in)``."""
        return 4 * shape[0] * shape[1] + 8 * self.scale.numel()


def _amax(weight: Tensor, size: int, shrink: Tensor | None) -> Tensor:
    """Return the largest absolute value of each group, times ``shrink``; ``[out, groups]``."""
    amax = weight.reshape(weight.shape[0], -1, size).abs().amax(dim=-1).float()
    return amax if shrink is None else amax * shrink


FLOAT_GRIDS: dict[str, type[FloatGrid]] = {
    grid.number: grid for grid in (FP8Grid, NVFP4Grid, MXFP4Grid)
}
