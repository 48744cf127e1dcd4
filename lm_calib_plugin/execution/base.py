"""A linear layer whose weights are stored as levels, for a kernel that multiplies them as such."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.execution.facts import Activation, Facts
from lm_calib_plugin.execution.levels import simulate_rows
from lm_calib_plugin.quantization.grids import Grid


class PackedLinear(nn.Module):
    """What all kernels share: the outside of a linear layer, and the way back to its weights.

    Stands where an ``nn.Linear`` (or GPT-2's Conv1D) stood. ``weight`` is computed anew, bit by
    bit what was given to :meth:`from_layer`, each time it is asked for; ``state_dict`` holds it
    too, so a packed model is saved as the simulated one. For evaluation only: `backward` is
    refused, and so is a change of dtype or of device.
    """

    kernel: ClassVar[str]
    # Which weights the kernel multiplies: "int", "fp8", or None for pruned ones.
    number: ClassVar[str | None]
    # Whether it multiplies quantized inputs.
    quantizes_inputs: ClassVar[bool] = False
    device_kind: ClassVar[str] = "cuda"
    # The buffers that stand for the weight.
    stored: ClassVar[tuple[str, ...]] = ("levels", "scale")

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, activation: Activation | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight_dtype = weight.dtype
        self.activation = activation
        self.bias = bias
        # What was replaced; in a tuple, so that it is no part of the model.
        self.replaced: tuple[nn.Module, ...] = ()
        # Whether that stored its weight as [in, out].
        self.transposed = False

    @classmethod
    @abstractmethod
    def from_layer(
        cls,
        weight: Tensor,
        grid: Grid | None,
        bias: nn.Parameter | None,
        activation: Activation | None,
    ) -> Self:
        """Pack a layer.

        Parameters
        ----------
        weight
            ``[out, in]`` as it is evaluated, on a grid.
        grid
            Its levels; None for pruned weights.
        bias
            ``[out]`` or None; kept as it is.
        activation
            How inputs are quantized; None: not at all.

        Raises
        ------
        UnpackableError
            If the weights are not levels that the kernel stores exactly.
        """
        ...

    @staticmethod
    @abstractmethod
    def refusal(facts: Facts) -> str | None:
        """Return why the kernel cannot serve a layer, None if it can."""
        ...

    @abstractmethod
    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply input rows ``[tokens, in]``; ``[tokens, out]``, with the bias, any dtype."""
        ...

    @classmethod
    @abstractmethod
    def emulate(
        cls,
        rows: Tensor,
        weight: Tensor,
        grid: Grid | None,
        bias: Tensor | None,
        activation: Activation | None,
    ) -> Tensor:
        """Compute what the kernel computes, in plain torch on any device; ``[tokens, out]``.

        Sums are exact (integers) or float32 (fp8, bfloat16); everything is rounded where the
        kernel rounds.
        """
        ...

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """Return the weight ``[out, in]`` that was packed, bit by bit."""
        ...

    @property
    def weight(self) -> Tensor:
        """The weight as the replaced module stored it, computed anew."""
        dense = self.dense_weight()
        return dense.t().contiguous() if self.transposed else dense

    @property
    def weight_bytes(self) -> int:
        """Bytes that levels, scales and zero points take in memory."""
        buffers = [self.get_buffer(name) for name in self.stored]
        return sum(b.numel() * b.element_size() for b in buffers)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        rows = x.reshape(-1, self.in_features)
        if not len(rows):
            return x.new_zeros(*x.shape[:-1], self.out_features)
        out: Tensor = _NoGradient.apply(rows, self.multiply)
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return shape and kernel."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kernel}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Scales have to stay float32 and levels what they are; packed orders are a device's own.
        probe = torch.zeros(1, dtype=torch.float32, device=next(self.buffers()).device)
        after = fn(probe)
        if after.dtype != probe.dtype or after.device.type != probe.device.type:
            raise UserError(
                "execution",
                f"a packed model was to be moved to {after.device} and {after.dtype}",
                "the device and dtype that it was packed for",
                "move the model first, or lm_calib_plugin.execution.unpack(model)",
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight


class _NoGradient(torch.autograd.Function):
    """Calls a function on rows; asked for its gradient, it refuses instead of leaving it out."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        return run(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UserError(
            "execution",
            "a gradient was asked for through a packed layer",
            "evaluation only",
            "use execution=simulated",
        )


def simulated(
    rows: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
) -> Tensor:
    """Compute what the simulated layer computes: rounded weights and inputs, dense product.

    Parameters
    ----------
    rows
        Input ``[tokens, in]``.
    weight, bias
        ``[out, in]`` and ``[out]`` as they are evaluated.
    activation
        How inputs are quantized.
    """
    return nn.functional.linear(simulate_rows(rows, activation), weight, bias)


def identity_rows(size: int, device: torch.device, dtype: torch.dtype, step: int = 1024) -> Any:
    """Yield the identity matrix ``[size, size]`` in pieces of at most ``step`` rows."""
    for start in range(0, size, step):
        rows = torch.zeros(min(step, size - start), size, dtype=dtype, device=device)
        rows[:, start : start + len(rows)].fill_diagonal_(1)
        yield rows
