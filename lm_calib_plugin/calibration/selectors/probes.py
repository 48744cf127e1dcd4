"""Probes: hooks that reduce each activation at once, while the pool runs through the model."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lm_calib_plugin.errors import NumericalError, UnsupportedModelError, listed


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right; ``counted`` is 1 for tokens that statistics count."""

    ids: Tensor
    mask: Tensor
    counted: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Tensor], device: torch.device) -> Batch:
        """Pad; all tokens but the first count (the first, too, when there is no other)."""
        ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        lengths = torch.tensor([len(s) for s in sequences])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        counted = mask.float()
        counted[lengths > 1, 0] = 0
        return cls(ids.to(device), mask.to(device), counted.to(device))


@dataclass(frozen=True)
class Maxima:
    """One tensor that one or more linear layers read.

    Parameters
    ----------
    layers
        Names of the layers inside the list of blocks.
    values
        ``[sequences, in]`` float32, the largest magnitude of each channel.
    energy
        ``[in]`` float64, squared norms of the weight columns, summed over the layers.
    """

    layers: tuple[str, ...]
    values: Tensor
    energy: Tensor


class Probe(ABC):
    """Base of what listens during the pass; a batch that ran out of memory leaves no trace."""

    def begin(self, batch: Batch) -> None:
        """Forget what an interrupted batch left."""
        self.batch = batch

    @abstractmethod
    def attach(self, blocks: nn.ModuleList) -> list[Any]:
        """Hook the blocks; return the handles."""

    @abstractmethod
    def finish(self, losses: Tensor) -> Any:
        """Return the findings of this batch."""

    @abstractmethod
    def commit(self, found: Any) -> None:
        """Keep the findings of a batch."""

    @abstractmethod
    def result(self) -> Any:
        """Return the findings of the pool."""


class MeanProbe(Probe):
    """Mean output of each block over the tokens that count."""

    def __init__(self) -> None:
        self._found: list[list[Tensor]] = []
        self._current: dict[int, Tensor] = {}

    def attach(self, blocks: nn.ModuleList) -> list[Any]:
        """Hook the output of every block."""
        self._found = [[] for _ in blocks]
        return [
            block.register_forward_hook(self._hook(number)) for number, block in enumerate(blocks)
        ]

    def _hook(self, number: int) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            counted = self.batch.counted.to(hidden.device)
            shares = counted / counted.sum(1, keepdim=True)
            mean = torch.einsum("blh,bl->bh", hidden.detach().float(), shares)
            self._current[number] = mean.cpu()

        return hook

    def begin(self, batch: Batch) -> None:
        """Forget what an interrupted batch left."""
        super().begin(batch)
        self._current = {}

    def finish(self, losses: Tensor) -> dict[int, Tensor]:
        """Return the means of this batch, checked."""
        for number, mean in self._current.items():
            if not bool(torch.isfinite(mean).all()):
                raise NumericalError(f"block {number}", "features of the pool", "not finite")
        return self._current

    def commit(self, found: dict[int, Tensor]) -> None:
        """Keep the means of a batch."""
        for number, mean in found.items():
            self._found[number].append(mean)

    def result(self) -> list[Tensor]:
        """Return ``[sequences, hidden]`` for every block."""
        return [torch.cat(parts) for parts in self._found]


class MaximaProbe(Probe):
    """Largest magnitude of every input channel of the linear layers inside the blocks.

    Layers that are given the very same tensor (query, key and value) are one input. A layer whose
    input does not hold every token of every sequence (an expert behind a router) is left out.
    """

    def __init__(self) -> None:
        self._found: dict[str, list[Tensor]] = {}
        self._current: dict[str, Tensor] = {}
        self._readers: dict[str, list[str]] = {}
        self._linear: dict[str, nn.Module] = {}
        self._last: tuple[str, Tensor] | None = None

    def attach(self, blocks: nn.ModuleList) -> list[Any]:
        """Hook every linear layer of the blocks."""
        self._linear = dict(linear_layers(blocks))
        return [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in self._linear.items()
        ]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, given: Any, named: Any) -> None:
            x = given[0] if given else named["input"]
            if self._last is not None and self._last[1] is x:
                readers = self._readers[self._last[0]]
                if name not in readers:
                    readers.append(name)
                return
            if x.shape[:-1] != self.batch.ids.shape:
                self._last = None
                return
            self._last = (name, x)
            self._readers.setdefault(name, [name])
            hidden = x.detach().abs().float() * self.batch.counted.to(x.device)[..., None]
            self._current[name] = hidden.amax(1).cpu()

        return hook

    def begin(self, batch: Batch) -> None:
        """Forget what an interrupted batch left."""
        super().begin(batch)
        self._current, self._last = {}, None

    def finish(self, losses: Tensor) -> dict[str, Tensor]:
        """Return the maxima of this batch, checked."""
        self._last = None
        for name, values in self._current.items():
            if not bool(torch.isfinite(values).all()):
                raise NumericalError(f"block {name}", "features of the pool", "not finite")
        return self._current

    def commit(self, found: dict[str, Tensor]) -> None:
        """Keep the maxima of a batch."""
        for name, values in found.items():
            self._found.setdefault(name, []).append(values)

    def result(self) -> list[Maxima]:
        """Return one entry for every input, with the weights that read it."""
        return [
            Maxima(
                tuple(self._readers[name]),
                torch.cat(parts),
                torch.stack([_column_energy(self._linear[n]) for n in self._readers[name]]).sum(0),
            )
            for name, parts in self._found.items()
        ]


def _column_energy(layer: nn.Module) -> Tensor:
    weight = layer.weight.detach()
    columns = weight.t() if isinstance(layer, Conv1D) else weight
    return columns.float().square().sum(0).double().cpu()


def linear_layers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every linear layer below a module."""
    for name, module in root.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def decoder_blocks(model: nn.Module, path: str | None) -> nn.ModuleList:
    """Return the list of decoder blocks: of ``path``, or the outermost list of fitting length.

    Raises
    ------
    UnsupportedModelError
        When there is none; the lists seen are named.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore
    fitting = [
        name
        for name, found in lists.items()
        if (name == path if path else len(found) == depth)
        and (path or not any(name.startswith(other + ".") for other in lists))
    ]
    if not fitting:
        raise UnsupportedModelError(
            "select",
            f"cannot find repeated blocks in {type(model).__name__}",
            f"lists seen: {listed(lists) or 'none'}",
            "give block_path=path.to.layers",
        )
    return lists[max(fitting, key=lambda n: sum(p.numel() for p in lists[n].parameters()))]


@contextlib.contextmanager
def keep_parameters_still(model: nn.Module) -> Iterator[None]:
    """Take no gradient of any parameter; put every flag back afterwards."""
    # By name: weights that are offloaded are other objects after every forward pass.
    flags = [
        (owner, name, p.requires_grad)
        for owner in model.modules()
        for name, p in owner.named_parameters(recurse=False)
    ]
    try:
        for owner, name, _ in flags:
            getattr(owner, name).requires_grad_(False)
        yield
    finally:
        for owner, name, wanted in flags:
            getattr(owner, name).requires_grad_(wanted)
