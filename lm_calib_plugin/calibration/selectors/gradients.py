"""Gradients of each sequence's loss with respect to a fixed random low-rank adapter.

An adapter adds ``B A x`` to the output ``W x`` of a linear layer. With ``B = 0`` the model is the
dense one and only ``B`` has a gradient: ``dL/dB = sum over tokens of (dL/dy) (A x)^T``. Both
factors are at hand during one forward and backward pass; no adapter is ever built. The gradients
of a sequence are folded into 1,024 numbers by a random sign and a random place for each entry (a
count sketch), which keeps inner products in expectation and needs no large matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.selectors.probes import Batch, Probe, linear_layers
from lm_calib_plugin.errors import NumericalError

RANK = 8
LAST_BLOCKS = 2
SKETCH = 1024


def adapter(name: str, width: int) -> Tensor:
    """Return the fixed ``A`` of a layer, ``[RANK, in]`` float32, entries of variance 1 / in."""
    generator = torch.Generator().manual_seed(derive_seed("adapter", name))
    return torch.randn(RANK, width, generator=generator) / width**0.5


def sketch(name: str, gradient: Tensor) -> Tensor:
    """Fold ``[batch, out, RANK]`` into ``[batch, SKETCH]`` float32, the same way every time."""
    flat = gradient.flatten(1)
    generator = torch.Generator().manual_seed(derive_seed("sketch", name))
    places = torch.randint(SKETCH, (flat.shape[1],), generator=generator)
    signs = torch.randint(2, (flat.shape[1],), generator=generator) * 2.0 - 1
    return torch.zeros(len(flat), SKETCH).index_add_(1, places, flat * signs)


class GradientProbe(Probe):
    """Sketched gradients, of the linear layers of the last blocks.

    A layer whose input does not hold every token (an expert behind a router) is left out.
    """

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._adapters: dict[str, Tensor] = {}
        self._current: dict[str, tuple[Tensor, Tensor]] = {}

    def attach(self, blocks: nn.ModuleList) -> list[Any]:
        """Hook the linear layers of the last blocks."""
        handles = []
        first = max(0, len(blocks) - LAST_BLOCKS)
        for number in range(first, len(blocks)):
            for name, module in linear_layers(blocks[number]):
                hook = self._hook(f"{number}.{name}")
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return handles

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, given: Any, named: Any, output: Tensor) -> Tensor | None:
            x = given[0] if given else named["input"]
            if x.shape[:-1] != self.batch.ids.shape:
                return None
            if name not in self._adapters:
                self._adapters[name] = adapter(name, x.shape[-1]).to(x.device)
            reduced = x.detach().float() @ self._adapters[name].t()
            # Zeros added to the output collect its gradient, token by token.
            change = torch.zeros_like(output, requires_grad=True)
            self._current[name] = (reduced, change)
            return output + change

        return hook

    def begin(self, batch: Batch) -> None:
        """Forget what an interrupted batch left."""
        super().begin(batch)
        self._current = {}

    def finish(self, losses: Tensor) -> Tensor:
        """Differentiate; return ``[batch, SKETCH]`` of this batch."""
        changes = [change for _, change in self._current.values()]
        # A token sees its own sequence only, so one sum serves all sequences of the batch.
        slopes = torch.autograd.grad(losses.sum(), changes, allow_unused=True)
        total = torch.zeros(len(losses), SKETCH)
        for (name, (reduced, _)), slope in zip(self._current.items(), slopes, strict=True):
            if slope is not None:
                gradient = torch.einsum("blo,blr->bor", slope.float(), reduced)
                total += sketch(name, gradient.cpu())
        self._current = {}
        if not bool(torch.isfinite(total).all()):
            raise NumericalError("last blocks", "features of the pool", "gradients not finite")
        return total

    def commit(self, found: Tensor) -> None:
        """Keep the gradients of a batch."""
        self._found.append(found.double())

    def result(self) -> Tensor:
        """Return ``[sequences, SKETCH]`` float64."""
        return torch.cat(self._found)
