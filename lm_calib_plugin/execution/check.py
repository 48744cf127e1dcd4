"""Which schemes run packed on a device; asked before any work."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.execution.base import PackedLinear
from lm_calib_plugin.execution.facts import Activation, Device, Facts
from lm_calib_plugin.execution.fp8 import FP8Linear
from lm_calib_plugin.execution.int4 import Int4WeightOnly
from lm_calib_plugin.execution.int8 import Int8Linear
from lm_calib_plugin.execution.int8_cpu import Int8CPULinear
from lm_calib_plugin.execution.semi_sparse import SemiSparseLinear

KERNELS: tuple[type[PackedLinear], ...] = (
    FP8Linear,
    Int8Linear,
    Int8CPULinear,
    Int4WeightOnly,
    SemiSparseLinear,
)
# A shape that is a multiple of everything, to ask about a scheme and not about a layer.
ANY_SHAPE = (4096, 4096)


def scheme_facts(
    number: str | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    activation: Activation | None,
    device: torch.device | str | Device,
    dtype: torch.dtype,
    pattern: str | None = None,
) -> Facts:
    """Return what a kernel is asked about a scheme, whatever the shape of a layer."""
    known = device if isinstance(device, Device) else Device.of(device)
    return Facts(known, dtype, ANY_SHAPE, number, bits, group_size, symmetric, activation, pattern)


def serving(
    facts: Facts, kernels: Sequence[type[PackedLinear]] = KERNELS
) -> tuple[list[type[PackedLinear]], str]:
    """Return the kernels that do not refuse, and why the others that come near do."""
    refusals = {kernel: kernel.refusal(facts) for kernel in kernels}
    able = [kernel for kernel, why in refusals.items() if why is None]
    here = "cpu" if facts.device.kind == "cpu" else "cuda"
    near = {
        kernel.kernel: why
        for kernel, why in refusals.items()
        if why is not None and _near(kernel, here, facts)
    }
    if not near and not able:
        return able, "no kernel multiplies such numbers: they are simulated only"
    return able, "; ".join(f"{name}: {why}" for name, why in near.items())


def _near(kernel: type[PackedLinear], here: str, facts: Facts) -> bool:
    kind = kernel.number, kernel.quantizes_inputs
    if kind != (facts.number, facts.activation is not None):
        return False
    # Of the two kernels of one scheme, the one of the other device has nothing to say.
    return kernel.device_kind == here or kernel not in (Int8Linear, Int8CPULinear)


def available(device: torch.device | str | Device, dtype: torch.dtype) -> list[str]:
    """Return what to type for the schemes that run packed on a device."""
    known = device if isinstance(device, Device) else Device.of(device)
    static8, static_fp8 = Activation("int", 8, False, 1.0), Activation("fp8", 8, False, 1.0)
    asked: dict[str, tuple[str | None, int, int, Activation | None, str | None]] = {
        "scheme=FP8": ("fp8", 8, -1, Activation("fp8"), None),
        "scheme=FP8_static": ("fp8", 8, -1, static_fp8, None),
        "scheme=W8A8": ("int", 8, -1, Activation(), None),
        "scheme=W8A8_static": ("int", 8, -1, static8, None),
        "scheme=W4A4": ("int", 4, -1, Activation(bits=4), None),
        "scheme=W4A8 with group_size=-1": ("int", 4, -1, Activation(), None),
        "scheme=W4A16": ("int", 4, 128, None, None),
        "pattern=2:4": (None, 16, -1, None, "2:4"),
    }
    found = []
    for text, (number, bits, group, activation, pattern) in asked.items():
        for tried in dict.fromkeys((dtype, torch.bfloat16)):
            facts = scheme_facts(number, bits, group, True, activation, known, tried, pattern)
            if serving(facts)[0]:
                found.append(text + ("" if tried == dtype else " with dtype=bfloat16"))
                break
    return found


def check_execution(
    number: str | None,
    bits: int = 16,
    group_size: int = -1,
    symmetric: bool = True,
    activation: Activation | None = None,
    device: torch.device | str | Device = "cpu",
    dtype: torch.dtype = torch.float32,
    pattern: str | None = None,
    name: str = "",
) -> list[str]:
    """Return the kernels that can serve a scheme on a device; shapes are not looked at.

    Parameters
    ----------
    number, bits, group_size, symmetric
        The levels of the weights; ``number=None``: pruned only.
    activation
        How inputs are quantized. For a static one any scale will do.
    device, dtype
        Where and in what the model is evaluated.
    pattern
        N:M pattern of pruned weights, for instance ``2:4``.
    name
        What the user typed, for the message: ``scheme=FP8``.

    Raises
    ------
    UserError
        If no kernel serves the scheme.
    """
    facts = scheme_facts(number, bits, group_size, symmetric, activation, device, dtype, pattern)
    able, why = serving(facts)
    if able:
        return [kernel.kernel for kernel in able]
    here = available(facts.device, dtype)
    raise UserError(
        "execution",
        f"got packed with {name or facts.scheme()} on a {facts.device}, and {why}",
        f"packed here: {listed(here)}" if here else "no scheme runs packed here",
        "use execution=simulated",
    )
