"""What a kernel is asked to serve: device, shape, levels of weights and inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lm_calib_plugin.quantization.activations import ActivationQuantizer
from lm_calib_plugin.quantization.numbers import FP8_MAX

Capability = tuple[int, int]


@dataclass(frozen=True)
class Activation:
    """How the inputs of a layer are quantized.

    Parameters
    ----------
    number
        ``int`` (symmetric) or ``fp8`` (e4m3).
    bits
        Width of a level number.
    dynamic
        One scale per token, from its largest absolute value; else one scale per layer.
    scale
        The scale of a static one; None where ``dynamic``.
    """

    number: str = "int"
    bits: int = 8
    dynamic: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.dynamic == (self.scale is not None):
            raise ValueError("a static activation has a scale, a dynamic one has none")

    @classmethod
    def of(cls, quantizer: ActivationQuantizer) -> Activation:
        """Return what a quantizer of the simulated model does."""
        spec, scale = quantizer.spec, quantizer.scale
        return cls(spec.number, spec.bits, spec.dynamic, None if scale is None else float(scale))

    def __str__(self) -> str:
        kind = "per token" if self.dynamic else "one static scale"
        return f"{self.number}{'' if self.number == 'fp8' else self.bits} inputs, {kind}"

    @property
    def reach(self) -> float:
        """Largest absolute value over the scale: 448 for e4m3, ``2^(bits-1) - 0.5`` for int."""
        return FP8_MAX if self.number == "fp8" else 2.0 ** (self.bits - 1) - 0.5


@dataclass(frozen=True)
class Device:
    """What decides which kernels there are.

    Parameters
    ----------
    kind
        ``cpu``, ``cuda``, ``rocm``, or what else torch calls it.
    capability
        Compute capability of a CUDA device.
    vnni
        Whether a CPU multiplies bytes into 32-bit sums in one instruction (AVX-512 VNNI).
    """

    kind: str
    capability: Capability | None = None
    vnni: bool = False

    @classmethod
    def of(cls, device: torch.device | str) -> Device:
        """Return the facts of a device of this machine."""
        device = torch.device(device)
        if device.type == "cuda" and getattr(torch.version, "hip", None):
            return cls("rocm")
        if device.type == "cuda":
            there = torch.cuda.is_available()
            return cls("cuda", torch.cuda.get_device_capability(device) if there else (0, 0))
        vnni = getattr(torch.cpu, "_is_vnni_supported", None)
        return cls(device.type, None, device.type == "cpu" and vnni is not None and bool(vnni()))

    def __str__(self) -> str:
        if self.capability is not None:
            return f"CUDA device of capability {self.capability[0]}.{self.capability[1]}"
        if self.kind == "cpu":
            return f"CPU {'with' if self.vnni else 'without'} AVX-512 VNNI"
        return self.kind


@dataclass(frozen=True)
class Facts:
    """One layer, as far as a kernel has to know it.

    Parameters
    ----------
    device, dtype
        Where the layer is, and the dtype of its weights.
    shape
        ``(out, in)``.
    number
        ``int``, ``fp8``, ``nvfp4``, ``mxfp4``, or None: the weights are not quantized.
    bits, group_size, symmetric
        As in :class:`~lm_calib_plugin.quantization.grids.GridSpec`; -1: one scale per row.
    activation
        How inputs are quantized; None: not at all.
    pattern
        ``2:4`` where at most two of every four consecutive weights are not zero.
    """

    device: Device
    dtype: torch.dtype
    shape: tuple[int, int]
    number: str | None
    bits: int = 16
    group_size: int = -1
    symmetric: bool = True
    activation: Activation | None = None
    pattern: str | None = None

    @property
    def per_row(self) -> bool:
        """Whether each output row has one scale."""
        return self.group_size in (-1, self.shape[1])

    def scheme(self) -> str:
        """Return the scheme in words, for a message."""
        if self.number is None:
            return f"pruned weights ({self.pattern or 'no N:M pattern'}), not quantized"
        kind = self.number + (str(self.bits) if self.number == "int" else "")
        groups = "one scale per row" if self.per_row else f"groups of {self.group_size}"
        zero = "" if self.symmetric else ", asymmetric"
        inputs = self.activation or f"{str(self.dtype).removeprefix('torch.')} inputs"
        return f"{kind} weights ({groups}{zero}), {inputs}"


def multiple_of(facts: Facts, out: int, width: int) -> str | None:
    """Refuse shapes that are not multiples of what the kernel computes at once."""
    if facts.shape[0] % out or facts.shape[1] % width:
        given = "x".join(map(str, facts.shape))
        return f"shape {given}: out and in have to be multiples of {out} and {width}"
    return None


def has_op(name: str) -> bool:
    """Tell whether this build of torch has an operator, ``namespace.name``."""
    space, _, op = name.partition(".")
    return hasattr(getattr(torch.ops, space), op)
