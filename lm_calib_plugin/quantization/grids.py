"""Grids: scales and zero points, and rounding to the nearest level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError, listed


@dataclass(frozen=True)
class GridSpec:
    """Which levels a layer gets, before its weights are looked at.

    Parameters
    ----------
    number
        ``int``, ``fp8`` (e4m3), ``nvfp4`` or ``mxfp4`` (e2m1 with shared scales).
    bits
        Width of a level number.
    group_size
        Consecutive inputs that share a scale; -1: one scale per output row.
    symmetric
        Whether an integer grid is symmetric around zero.
    """

    number: str = "int"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def fit(
        self, weight: Tensor, dtype: torch.dtype = torch.float32, shrink: Tensor | None = None
    ) -> Grid:
        """Return the grid that spans the range of each group of a weight ``[out, in]``.

        ``shrink`` (``[out, groups]``, or a scalar) multiplies the ranges.

        Raises
        ------
        UserError
            For a kind of number that is not known, or a width or group size it does not have.
        """
        if self.number == "int":
            return IntegerGrid.fit(
                weight, self.bits, self.group_size, self.symmetric, dtype, shrink
            )
        # The floating point grids are grids, too.
        from lm_calib_plugin.quantization.float_grids import FLOAT_GRIDS

        if self.number not in FLOAT_GRIDS:
            raise UserError("number", f"got {self.number}", listed(["int", *FLOAT_GRIDS]))
        kind = FLOAT_GRIDS[self.number]
        if self.bits != kind.bits:
            got = f"got {self.bits} with {self.number}"
            raise UserError("bits", got, f"{self.number} has {kind.bits}", f"bits={kind.bits}")
        size = kind.fixed_size
        if size is not None and self.group_size != size:
            got = f"got {self.group_size} with {self.number}"
            raise UserError("group_size", got, f"its groups have {size}", f"group_size={size}")
        return kind.fit(weight, self.group_size, dtype, shrink)


class Grid(ABC):
    """The levels of every weight of one layer.

    ``number`` is the kind of number (``GridSpec.number``), ``bits`` the width of a level number,
    ``group_size`` the number of consecutive inputs that share a scale, ``scale`` the scales in
    float32, ``[out, groups]``; ``has_zero`` tells whether 0 is a level of every weight.
    """

    number: ClassVar[str] = "int"
    has_zero: ClassVar[bool] = True
    bits: int
    group_size: int
    scale: Tensor

    @abstractmethod
    def round(self, weight: Tensor) -> Tensor:
        """Round a weight ``[out, in]`` to the nearest levels; float32."""
        ...

    @abstractmethod
    def round_column(self, column: Tensor, group: int) -> Tensor:
        """Round one column ``[out]`` that lies in a group to the nearest levels; float32."""
        ...

    @abstractmethod
    def clipped(self, weight: Tensor) -> float:
        """Return the share of the weights ``[out, in]`` beyond the outermost levels.

        More than half a step beyond, so that rounding to nearest alone does not count.
        """
        ...

    @abstractmethod
    def stored_bits(self, shape: tuple[int, int]) -> float:
        """Return the bits of a stored weight ``(out, in)``: levels, scales and zero points."""
        ...

    def holds(self, weight: Tensor) -> bool:
        """Tell whether every element of a stored weight ``[out, in]`` is a level of this grid."""
        return bool((self.round(weight.float()).to(weight.dtype) == weight).all())


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """``2^bits`` levels per group of consecutive inputs of each output row.

    ``w' = scale * (q - zero)`` with integer ``q``. Symmetric: ``zero = 0`` and ``q`` in
    ``[-2^(bits-1), 2^(bits-1) - 1]``; asymmetric: ``q`` in ``[0, 2^bits - 1]``.

    ``scale`` and ``zero`` are ``[out, groups]`` in float32; ``scale`` holds values that ``dtype``
    represents exactly, so that a stored checkpoint reproduces the same weights.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale: Tensor
    zero: Tensor
    dtype: torch.dtype

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        bits: int,
        group_size: int = -1,
        symmetric: bool = True,
        dtype: torch.dtype = torch.float32,
        shrink: Tensor | None = None,
    ) -> IntegerGrid:
        """Fit the min-max grid of a weight ``[out, in]``.

        The symmetric scale is ``max|w| / (2^(bits-1) - 0.5)``, the convention of the
        compressed-tensors format; the asymmetric range always contains zero, so that zero is a
        level in both. A group of zeros gets scale 1. ``shrink`` (``[out, groups]`` or a scalar)
        multiplies the range of each group.
        """
        rows, width = weight.shape
        size = width if group_size == -1 else group_size
        groups = weight.reshape(rows, width // size, size)
        if symmetric:
            scale = groups.abs().amax(dim=-1) / (2 ** (bits - 1) - 0.5)
        else:
            low = groups.amin(dim=-1).clamp(max=0)
            scale = (groups.amax(dim=-1).clamp(min=0) - low) / (2**bits - 1)
            low = low if shrink is None else low * shrink
        scale = scale if shrink is None else scale * shrink
        # A scale below what the dtype can hold would turn a whole group into zeros.
        info = torch.finfo(dtype)
        stored = scale.to(dtype).float().clamp(min=info.smallest_normal * info.eps)
        scale = torch.where(scale > 0, stored, torch.ones_like(scale))
        zero = torch.zeros_like(scale)
        if not symmetric:
            zero = (-low / scale).round().clamp(0, 2**bits - 1)
        return cls(bits, size, symmetric, scale, zero, dtype)

    @property
    def lowest(self) -> int:
        """Smallest integer level."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """Largest integer level."""
        return self.lowest + 2**self.bits - 1

    def round_group(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Round ``values`` to levels of broadcastable ``scale`` and ``zero``; float32."""
        level = (values / scale).round_().add_(zero).clamp_(self.lowest, self.highest)
        return level.sub_(zero).mul_(scale)

    def round(self, weight: Tensor) -> Tensor:
        """Round a weight ``[out, in]`` to the nearest levels."""
        rows, width = weight.shape
        groups = weight.reshape(rows, -1, self.group_size)
        rounded = self.round_group(groups, self.scale[..., None], self.zero[..., None])
        return rounded.reshape(rows, width)

    def holds(self, weight: Tensor) -> bool:
        """Tell whether every element of a stored weight ``[out, in]`` is a level of this grid."""
        near = weight.float()
        held = self.round(near).to(weight.dtype) == weight
        if not held.all():
            # Numbers of a short dtype lie closer together below a power of two than above it, so
            # that the level a number stands for need not be the nearest one; it is next to that.
            step = self.scale.repeat_interleave(self.group_size, dim=1)
            for other in (near + step, near - step):
                held |= self.round(other).to(weight.dtype) == weight
        return bool(held.all())

    def round_column(self, column: Tensor, group: int) -> Tensor:
        """Round one column ``[out]`` of a group to the nearest levels."""
        return self.round_group(column, self.scale[:, group], self.zero[:, group])

    def clipped(self, weight: Tensor) -> float:
        """Return the share of weights ``[out, in]`` more than half a step beyond the levels."""
        groups = weight.reshape(weight.shape[0], -1, self.group_size)
        place = groups / self.scale[..., None] + self.zero[..., None]
        # The symmetric scale puts the largest weight half a step beyond the highest level.
        beyond = (place > self.highest + 0.501) | (place < self.lowest - 0.501)
        return float(beyond.float().mean())

    def stored_bits(self, shape: tuple[int, int]) -> float:
        """Return the bits of levels, scales (in ``dtype``) and zero points of a weight."""
        out, width = shape
        each = 8 * self.dtype.itemsize + (0 if self.symmetric else self.bits)
        return out * width * self.bits + self.scale.numel() * each


@dataclass(frozen=True)
class RealZeroGrid(IntegerGrid):
    """An asymmetric integer grid whose zero points are any numbers that ``dtype`` holds.

    ``w' = scale * (q - zero)`` with ``q`` in ``[0, 2^bits - 1]``, so that 0 need not be a level.
    """

    has_zero: ClassVar[bool] = False

    @classmethod
    def of(cls, grid: IntegerGrid, zero: Tensor) -> RealZeroGrid:
        """Return a grid with other zero points, ``[out, groups]``, rounded to the dtype."""
        stored = zero.to(grid.dtype).float()
        return cls(grid.bits, grid.group_size, False, grid.scale, stored, grid.dtype)

    def round_group(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Round ``values`` to levels of broadcastable ``scale`` and ``zero``; float32."""
        level = (values / scale).add_(zero).round_().clamp_(self.lowest, self.highest)
        return level.sub_(zero).mul_(scale)

    def stored_bits(self, shape: tuple[int, int]) -> float:
        """Return the bits of levels, scales and zero points (both in ``dtype``) of a weight."""
        out, width = shape
        return out * width * self.bits + 2 * self.scale.numel() * 8 * self.dtype.itemsize


def stacked(grids: Sequence[Grid]) -> IntegerGrid | None:
    """Return the grid of the rows of all layers; None unless these are integer grids of one kind.

    Scales and zero points of integer grids belong to single rows, so nothing changes.
    """
    first = grids[0]
    if not isinstance(first, IntegerGrid):
        return None
    alike = {(type(g), g.bits, g.group_size, getattr(g, "symmetric", None)) for g in grids}
    if len(alike) > 1 or type(first) is not IntegerGrid:
        return None
    same = [grid for grid in grids if isinstance(grid, IntegerGrid)]
    scale, zero = (torch.cat([getattr(g, name) for g in same]) for name in ("scale", "zero"))
    return replace(first, scale=scale, zero=zero)
