"""Element-wise steps around a kernel, as one kernel where that can be had."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


class Fused:
    """A function of tensors that is compiled on CUDA devices, and runs as it is elsewhere.

    Un-fused, the passes over memory before and after an 8-bit product take longer than the product
    saves. Should compiling fail, the plain function serves, and ``failure`` tells why.
    """

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> None:
        self.function = function
        self.failure: str | None = None
        functools.update_wrapper(self, function)

    @functools.cached_property
    def compiled(self) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
        """The compiled function; sizes are left open, so that one serves all layers."""
        return torch.compile(self.function, dynamic=True)

    def __call__(self, tensor: Tensor, *others: object) -> Tensor | tuple[Tensor, Tensor]:
        """Call the function."""
        if tensor.device.type != "cuda" or self.failure is not None:
            return self.function(tensor, *others)
        try:
            return self.compiled(tensor, *others)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # No compiler, or one that cannot: every layer would fail in the same way.
            self.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return self.function(tensor, *others)
