"""2:4 sparse weights on CUDA: ``torch.sparse.to_sparse_semi_structured``.

Source: https://docs.pytorch.org/docs/stable/sparse.html#sparse-semi-structured-tensors
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lm_calib_plugin.execution.base import PackedLinear
from lm_calib_plugin.execution.facts import Facts, multiple_of
from lm_calib_plugin.execution.levels import UnpackableError, exact_two_four
from lm_calib_plugin.quantization.grids import Grid


class SemiSparseLinear(PackedLinear):
    """Weights with at most two of every four not zero, stored as these two and their places.

    The tensor cores skip the zeros; it pays for many tokens at once, and not for a few.
    """

    kernel = "2:4"
    number = None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(weight, bias, None)
        packed = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
        self.register_buffer("packed", packed, persistent=False)
        self.packed: Tensor

    @classmethod
    def from_layer(cls, weight: Tensor, grid: Grid | None, bias: Any, activation: Any) -> Self:
        """Pack a pruned weight."""
        _check(weight)
        return cls(weight, bias)

    @staticmethod
    def refusal(facts: Facts) -> str | None:
        """Return why the kernel cannot serve a layer, None if it can."""
        if facts.number is not None:
            return "serves weights that are not quantized"
        if facts.pattern != "2:4":
            return "needs weights pruned with pattern=2:4"
        if facts.activation is not None:
            return "does not quantize inputs"
        if facts.device.capability is None or facts.device.capability < (8, 0):
            return "needs a CUDA device of capability 8.0 or newer"
        if facts.dtype not in (torch.bfloat16, torch.float16):
            return "computes in bfloat16 or float16 (dtype=bfloat16)"
        return multiple_of(facts, 64, 64)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the kept half and of two bits for the place of each kept weight."""
        kept = self.in_features * self.out_features // 2
        return kept * self.weight_dtype.itemsize + kept // 4

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply input rows ``[tokens, in]``."""
        return nn.functional.linear(rows.to(self.weight_dtype), self.packed, self.bias)

    @classmethod
    def emulate(
        cls, rows: Tensor, weight: Tensor, grid: Grid | None, bias: Tensor | None, activation: Any
    ) -> Tensor:
        """Gather for each kept weight its input, sum in float32, round to the weight's dtype."""
        _check(weight)
        out, width = weight.shape
        quads = weight.reshape(out, width // 4, 4).float()
        places = quads.abs().topk(2, dim=-1).indices
        kept = quads.gather(-1, places).reshape(out, -1)
        places = (places + 4 * torch.arange(width // 4)[None, :, None]).reshape(out, -1)
        values = rows.to(weight.dtype).float()
        found = torch.stack([values[:, p] @ k for p, k in zip(places, kept, strict=True)], dim=1)
        return (found if bias is None else found + bias.float()).to(weight.dtype)

    def dense_weight(self) -> Tensor:
        """Return the weight ``[out, in]`` that was packed."""
        return self.packed.to_dense()  # type: ignore[no-untyped-call, unused-ignore]


def _check(weight: Tensor) -> None:
    if not exact_two_four(weight):
        raise UnpackableError("more than two of some four consecutive weights are not zero")
