"""Small floating point numbers: e4m3, e2m1, and the block formats made of them.

Everything is simulated in float32: the functions return the values that the formats hold. Ties go
to the even mantissa, and what lies beyond the largest value becomes the largest value, as in the
OCP Microscaling Formats specification 1.0 and the OCP 8-bit Floating Point specification 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The largest values of e4m3 ("fn": no infinity) and e2m1, and the smallest positive e4m3.
FP8_MAX, E2M1_MAX = 448.0, 6.0
FP8_TINY = 2.0**-9
# The scale that compressed-tensors gives to a group whose own would be 0.
FP8_EMPTY = 0.125
# Inputs that share a scale.
NVFP4_GROUP, MXFP4_GROUP = 16, 32


def to_fp8(values: Tensor) -> Tensor:
    """Round to the nearest e4m3 values; float32, saturated at 448."""
    # Some versions of torch turn what lies beyond 448 into NaN.
    return values.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def round_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Round ``x`` to ``scale`` times an e4m3 value; float32.

    ``scale`` is positive and broadcastable to ``x``.
    """
    return to_fp8(x.float() / scale).mul_(scale)


def round_e2m1(x: Tensor) -> Tensor:
    """Round to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with sign; float32.

    Between a power of two and the next one the values are evenly spaced, and rounding a multiple
    of the spacing to the even number is rounding to the even mantissa.
    """
    x = x.float().clamp(-E2M1_MAX, E2M1_MAX)
    size = x.abs()
    step = torch.full_like(size, 0.5).masked_fill_(size >= 2, 1.0).masked_fill_(size >= 4, 2.0)
    return x.div_(step).round_().mul_(step)


def power_of_two_below(values: Tensor) -> Tensor:
    """Return ``2^floor(log2 v)`` of positive values, exactly; float32, at least ``2^-126``."""
    exponent = torch.frexp(values.float()).exponent - 1
    # Written as the bits of a float32, since powers of two by `pow` are not exact everywhere.
    return ((exponent.clamp(-126, 127) + 127) << 23).to(torch.int32).view(torch.float32)


def nvfp4_scale(amax: Tensor, largest: Tensor) -> Tensor:
    """Return the scales of nvfp4 groups: an e4m3 value over one global factor; float32.

    Parameters
    ----------
    amax
        Largest absolute value of each group.
    largest
        Largest absolute value of everything that shares the global factor ``448 * 6 / largest``;
        broadcastable to ``amax``.

    Notes
    -----
    A group far smaller than the largest would get the scale 0; it gets the smallest one instead.
    """
    factor = nvfp4_factor(largest)
    return to_fp8(amax.float() * (factor / E2M1_MAX)).clamp_(min=FP8_TINY).div_(factor)


def nvfp4_factor(largest: Tensor) -> Tensor:
    """Return the global factor ``448 * 6 / largest`` of nvfp4; 1 where ``largest`` is 0."""
    factor = FP8_MAX * E2M1_MAX / largest.float()
    # Without it a tensor of zeros, or of hardly more, would get the factor infinity.
    return torch.where(factor.isfinite(), factor, torch.ones_like(factor))


def mxfp4_scale(amax: Tensor) -> Tensor:
    """Return the scales of mxfp4 groups, ``2^(floor(log2 amax) - 2)``; 1 for zeros; float32.

    The rule of the OCP specification: the largest value of a group falls between 4 and 8, where
    what lies beyond 6 is cut.
    """
    scale = power_of_two_below(amax).div_(4).clamp_(min=torch.finfo(torch.float32).tiny)
    return torch.where(amax > 0, scale, torch.ones_like(scale))


def nvfp4_round(x: Tensor, largest: Tensor | None = None) -> Tensor:
    """Round the last dimension of ``x`` (``[..., in]``) to nvfp4; float32.

    As the loader of compressed-tensors rounds activations: a sixth of the largest value of a group
    is taken in the dtype of ``x``, and a group far smaller than the largest, whose scale would be
    0, gets ``1 / 8`` over the factor, by which all of it becomes 0.

    Parameters
    ----------
    x
        Any floating point dtype; ``in`` is a multiple of 16.
    largest
        What the global factor is made from, broadcastable to ``[..., 1]``. None: the largest
        absolute value of each last dimension, so that what else is in the batch does not matter.
    """
    groups = x.unflatten(-1, (-1, NVFP4_GROUP))
    amax = groups.abs().amax(dim=-1)
    factor = nvfp4_factor(amax.amax(dim=-1, keepdim=True) if largest is None else largest)
    stored = to_fp8((amax / E2M1_MAX).float() * factor)
    scale = (torch.where(stored > 0, stored, FP8_EMPTY) / factor)[..., None]
    return round_e2m1(groups.float() / scale).mul_(scale).flatten(-2)


def mxfp4_round(x: Tensor) -> Tensor:
    """Round the last dimension of ``x`` (``[..., in]``, a multiple of 32) to mxfp4; float32.

    As the loader of compressed-tensors rounds activations: the largest value of a group falls
    between 3.5 and 7, so that hardly anything beyond 6 is cut.
    """
    groups = x.float().unflatten(-1, (-1, MXFP4_GROUP))
    amax = groups.abs().amax(dim=-1)
    scale, power = mxfp4_scale(amax), power_of_two_below(amax)
    # Twice the scale from 7/4 of a power of two on, unless its levels would leave float32.
    more = (amax >= 1.75 * power) & (power < 2.0**127)
    scale = torch.where(more, 2 * scale, scale)[..., None]
    return round_e2m1(groups / scale).mul_(scale).flatten(-2)
