"""Noise of a stated size on weights and inputs of layers, from generators of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin import engine
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.diagnostics.sensitivity.options import ALIGNED, UNIFORM
from lm_calib_plugin.engine.sublayers import first_input


def weight_noise(
    weight: Tensor, size: float, kind: str, generator: torch.Generator, error: Tensor | None = None
) -> Tensor:
    """Return noise for a weight, float32 ``[out, in]``, on its device.

    Parameters
    ----------
    weight
        ``[out, in]``.
    size
        Frobenius norm of the noise over that of the weight, met to the last digits of float32.
    kind
        ``gaussian``, ``uniform`` (both around 0), or ``aligned``: sizes of a normal distribution
        with the signs of ``error``, 0 where that is 0.
    generator
        On the CPU, so that every device gets the same noise.
    error
        ``compressed - dense``, ``[out, in]``.

    Returns
    -------
    Tensor
        All zeros where there is nothing to be relative to, or no sign to follow.
    """
    raw = _drawn(tuple(weight.shape), kind, generator).to(weight.device)
    if kind == ALIGNED:
        assert error is not None
        raw = raw.abs() * error.to(raw.device).sign()
    length = torch.linalg.vector_norm(raw, dtype=torch.float64)
    if length == 0:
        return raw
    target = size * torch.linalg.vector_norm(weight, dtype=torch.float64)
    return (raw.double() * (target / length)).float()


def input_noise(x: Tensor, size: float, kind: str, generator: torch.Generator) -> Tensor:
    """Return noise for inputs ``[..., in]``: of each token, ``size`` times its own 2-norm."""
    raw = _drawn(tuple(x.shape), kind, generator).to(x.device)
    lengths = torch.linalg.vector_norm(raw, dim=-1, keepdim=True)
    own = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    return raw * (size * own / lengths.clamp_min(torch.finfo(torch.float32).tiny))


def mirrored(kind: str, seed: int) -> tuple[int, int]:
    """Return which draw a seed takes, and with which sign.

    Two seeds share a draw, with both signs: what is linear in the noise cancels in their mean, and
    would drown what small noise does. Signs of ``aligned`` noise are its point and stay.
    """
    return (seed, 1) if kind == ALIGNED else (seed // 2, -1 if seed % 2 else 1)


def generator_of(*parts: int | str) -> torch.Generator:
    """Return a generator of its own for what the parts name."""
    return torch.Generator().manual_seed(derive_seed("sensitivity", *parts))


@contextlib.contextmanager
def noisy_inputs(
    layers: Sequence[engine.TargetLayer], size: float, kind: str, seed: int
) -> Iterator[None]:
    """Add noise to what modules receive, as long as the context lasts.

    Every module has noise of its own, also where several share an input. Of fused experts the
    input of all is disturbed once, and nothing in between.
    """
    draw, sign = mirrored(kind, seed)
    hooks = []
    for group in engine.by_module(layers):
        drawn = generator_of("inputs", kind, draw, group[0].name)

        def disturb(
            _module: Any, args: Any, kwargs: Any, drawn: torch.Generator = drawn
        ) -> tuple[Any, Any]:
            x = first_input(args, kwargs)
            noisy = (x.float() + sign * input_noise(x, size, kind, drawn)).to(x.dtype)
            if args:
                return (noisy, *args[1:]), kwargs
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, name: noisy}

        hooks.append(group[0].module.register_forward_pre_hook(disturb, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drawn(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
    if kind == UNIFORM:
        return torch.rand(shape, generator=generator) * 2 - 1
    return torch.randn(shape, generator=generator)
