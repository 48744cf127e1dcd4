"""Simulated quantization of activations: what a layer would see of its rounded input."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.quantization.numbers import (
    E2M1_MAX,
    FP8_MAX,
    MXFP4_GROUP,
    NVFP4_GROUP,
    mxfp4_round,
    nvfp4_round,
    round_fp8,
)

# Bits that each kind of number can have.
WIDTHS = {"int": tuple(range(2, 9)), "fp8": (8,), "nvfp4": (4,), "mxfp4": (4,)}
GROUPS = {"nvfp4": NVFP4_GROUP, "mxfp4": MXFP4_GROUP}
ANY_BITS = 8
# Divided by a scale times this, the largest value, half way between two levels, goes outward, as it
# does in exact arithmetic.
OUTWARD = 1 - 2.0**-21
# The largest value over the scale.
SPANS = {"fp8": FP8_MAX, "nvfp4": FP8_MAX * E2M1_MAX}


@dataclass(frozen=True)
class ActivationSpec:
    """Which values an activation is rounded to.

    The levels are symmetric around zero. Integers follow the convention of compressed-tensors:
    the scale is ``amax / ((2^bits - 1) / 2)`` (``amax / 127.5`` for 8 bits) and the levels are
    ``-2^(bits-1) .. 2^(bits-1) - 1``: ``amax``, half a step beyond the highest, is clipped to that,
    and ``-amax``, half way between the lowest two, becomes one of these, as the last bit of the
    division has it. For ``fp8`` (e4m3) the scale is ``amax / 448``. Everything is computed in
    float32, step by step what the loader of compressed-tensors computes for a float32 model.

    Parameters
    ----------
    number
        ``int``, ``fp8``, ``nvfp4`` or ``mxfp4``. The last two share scales among 16 and 32
        consecutive channels; these are always taken from the values themselves.
    bits
        2 to 8 for integers; the other numbers have a width of their own (8, 4, 4), which is what
        is kept here.
    dynamic
        Whether the largest absolute value ``amax`` is taken from each token anew (over the last
        dimension), or one for the whole tensor was fixed on calibration data. For ``nvfp4`` it
        only decides the factor that all block scales of a token share; ``mxfp4`` has none.

    Raises
    ------
    UserError
        For an unknown number, a width that it does not come in, or static ``mxfp4``.
    """

    number: str = "int"
    bits: int = ANY_BITS
    dynamic: bool = True

    def __post_init__(self) -> None:
        widths = WIDTHS.get(self.number)
        if widths is None:
            raise UserError("activations", f"got {self.number}", f"one of {listed(WIDTHS)}")
        if self.number != "int" and self.bits == ANY_BITS:
            object.__setattr__(self, "bits", widths[0])
        if self.bits not in widths:
            allowed = f"{widths[0]} to {widths[-1]}" if len(widths) > 1 else str(widths[0])
            raise UserError("act_bits", f"got {self.bits}", f"for {self.number}: {allowed}")
        if self.number == "mxfp4" and not self.dynamic:
            raise UserError(
                "act_dynamic",
                "got false for mxfp4",
                "mxfp4 takes every scale from the values of a block",
                "act_dynamic=true",
            )

    @property
    def lowest(self) -> int:
        """Smallest integer level."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """Largest integer level."""
        return -self.lowest - 1

    def describe(self) -> str:
        """Return the name by which the spec is told from all others, such as ``int8 dynamic``."""
        number = f"int{self.bits}" if self.number == "int" else self.number
        return f"{number} {'dynamic' if self.dynamic else 'static'}"

    def check_width(self, name: str, width: int) -> None:
        """Refuse a layer whose inputs do not make up whole blocks.

        Raises
        ------
        UserError
            Names the layer, and what to leave out.
        """
        size = GROUPS.get(self.number, 1)
        if width % size:
            raise UserError(
                "scheme",
                f"{self.number} shares scales among {size} channels, and layer {name} has {width} "
                "inputs",
                f"widths that are multiples of {size}",
                f"leave the layer as it is with ignore={name.rsplit('.', 1)[-1]}",
            )

    @property
    def span(self) -> float:
        """The largest value over the scale."""
        return (2**self.bits - 1) / 2 if self.number == "int" else SPANS.get(self.number, 1.0)

    def storable(self, limit: float, dtype: torch.dtype) -> float:
        """Return the limit nearest to ``limit`` whose scale ``dtype`` holds exactly.

        A stored model keeps its scales in its own dtype, the factor of ``nvfp4`` in float32.
        """
        if self.number not in ("int", "fp8") or dtype.itemsize >= torch.float32.itemsize:
            return limit
        info = torch.finfo(dtype)
        least = info.smallest_normal * info.eps
        scale = self.scale(torch.tensor(limit)).clamp(least, info.max).to(dtype)
        # Exact: the span has eight bits, a scale of 16 bits at most eleven.
        return float(scale) * self.span

    def scale(self, amax: Tensor) -> Tensor:
        """Return the scale, float32, with which the levels span ``amax``; 1 where that is 0.

        For ``nvfp4`` this is the reciprocal of the global factor, as far as float32 tells.
        """
        scale = amax.float() / self.span
        # Below the normal numbers a scale can become zero, or lose what it has to say.
        scale = scale.clamp(min=torch.finfo(torch.float32).smallest_normal)
        return torch.where(amax > 0, scale, torch.ones_like(scale))

    def round(self, x: Tensor, limit: Tensor | None = None) -> Tensor:
        """Round activations ``x`` (``[..., in]``) to the levels; float32, ``x`` is not changed.

        ``limit`` is the largest absolute value that is represented, broadcastable to
        ``[..., 1]``; what lies beyond is clipped. None: that of each token.
        """
        if self.number == "mxfp4":
            return mxfp4_round(x)
        if self.number == "nvfp4":
            return nvfp4_round(x, limit)
        values = x.float()
        if limit is None:
            limit = values.abs().amax(dim=-1, keepdim=True)
        scale = self.scale(limit)
        if self.number == "fp8":
            return round_fp8(values, scale)
        return self.levels(values, scale).mul_(scale)

    def levels(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the numbers of the integer levels nearest to ``values / scale``; float32."""
        return (values / scale).round_().clamp_(self.lowest, self.highest)


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Round to integers with one scale for every last dimension of ``x``; the dtype of ``x``.

    See :class:`ActivationSpec` for the levels; here ``-amax`` always becomes the lowest. No format
    stores keys and values, and what a cache holds must not hang on the last bit of a division.
    """
    spec, values = ActivationSpec("int", bits), x.float()
    scale = spec.scale(values.abs().amax(dim=-1, keepdim=True))
    return spec.levels(values, scale * OUTWARD).mul_(scale).to(x.dtype)


class ActivationQuantizer(nn.Module):
    """Rounds what goes through it to the levels of a spec; shape and dtype stay.

    Layers that share an input share a quantizer: the last result is kept as long as the tensor it
    was made from lives, and given again for the very same tensor, as long as that was not changed
    in place.

    Parameters
    ----------
    spec
        The levels.
    limit
        Largest absolute value that is represented, positive; needed by, and only by, a static
        spec. Kept in float32, whatever dtype the model is cast to, and never stored with it.
    """

    limit: Tensor | None

    def __init__(self, spec: ActivationSpec, limit: float | None = None) -> None:
        super().__init__()
        if spec.dynamic != (limit is None) or (limit is not None and not 0 < limit < float("inf")):
            raise ValueError(f"{spec.describe()} activations with the limit {limit}")
        self.spec = spec
        value = None if limit is None else torch.tensor(limit, dtype=torch.float32)
        self.register_buffer("limit", value, persistent=False)
        # The last input, how often it had been changed, and the result; or nothing.
        self._last: list[tuple[weakref.ref[Tensor], int, Tensor]] = []

    @property
    def scale(self) -> Tensor | None:
        """The scale of a static spec, a float32 scalar; None for a dynamic one."""
        return None if self.limit is None else self.spec.scale(self.limit)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded activations, in the dtype and shape ``[..., in]`` of ``x``."""
        # Tensors of inference mode do not count their changes, and a graph is used only once.
        keeps = not x.is_inference() and not (x.requires_grad and torch.is_grad_enabled())
        for whose, version, result in self._last if keeps else ():
            if whose() is x and version == x._version:
                return result
        limit = None if self.limit is None else self.limit.to(x.device)
        result = self.spec.round(x, limit).to(x.dtype)
        if keeps:
            self._last[:] = [(_lasting(x, self._last), x._version, result)]
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> ActivationQuantizer:
        exact = self.limit
        super()._apply(fn, recurse)
        self._last.clear()
        if exact is not None and self.limit is not None:
            # A cast of the model must not move the levels.
            self.limit = exact.to(self.limit.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": []}

    def extra_repr(self) -> str:
        """Return spec and limit, for printing the model."""
        limit = "" if self.limit is None else f", limit={float(self.limit):.6g}"
        return self.spec.describe() + limit


def _lasting(x: Tensor, kept: list[Any]) -> weakref.ref[Tensor]:
    """Return a reference to ``x`` that empties the list when ``x`` goes, if it is still in it."""

    def forget(gone: weakref.ref[Tensor]) -> None:
        if kept and kept[0][0] is gone:
            kept.clear()

    return weakref.ref(x, forget)
