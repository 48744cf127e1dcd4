"""The attention and the MLP of a decoder block, and how to leave one of them out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lm_calib_plugin.engine.batches import BlockCall
from lm_calib_plugin.engine.capture import replay
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.errors import UnsupportedModelError, listed

ATTENTION, MLP = "attention", "mlp"
# A name, or a chain of names that only together are the sub-layer (those of OPT).
NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    ATTENTION: (("self_attn",), ("attn",), ("attention",), ("self_attention",)),
    MLP: (("mlp",), ("feed_forward",), ("block_sparse_moe",), ("ffn",), ("fc1", "fc2")),
}


@dataclass(frozen=True, eq=False)
class Sublayer:
    """One sub-layer of a block: the modules of which it is made, called one after the other.

    ``outputs`` is how many values its last module returns: 0 for a bare tensor.
    """

    name: str
    block: nn.Module
    kind: str
    members: tuple[str, ...]
    outputs: int

    @property
    def modules(self) -> list[nn.Module]:
        """The live modules."""
        return [getattr(self.block, member) for member in self.members]

    def stand_ins(self, term: nn.Module | None = None) -> list[nn.Module]:
        """Return modules that take the place: nothing is added, or what ``term`` gives."""
        last = StandIn(self.modules[-1], self.outputs, term)
        return [*(nn.Identity() for _ in self.members[:-1]), last]

    def replace(self, modules: list[nn.Module]) -> None:
        """Put modules in the place of the sub-layer."""
        for member, module in zip(self.members, modules, strict=True):
            setattr(self.block, member, module)


class StandIn(nn.Module):
    """Stands in for attention or an MLP: adds nothing, or a term, to the residual stream.

    The cache is still told how many tokens have passed (one number a token), since lengths and
    masks of the whole model are read from its first entries, whichever blocks those belong to.
    """

    def __init__(self, original: nn.Module, outputs: int, term: nn.Module | None = None) -> None:
        super().__init__()
        self.outputs = outputs
        self.term = term
        # What models look up on their attention: its place in the cache, window, kind.
        for name, value in vars(original).items():
            plain = value is None or isinstance(value, (bool, int, float, str))
            if plain and not name.startswith("_") and name not in ("training", "outputs", "term"):
                setattr(self, name, value)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros, or the term, in the form that the original returned."""
        x = first_input(args, kwargs)
        cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
        place = getattr(self, "layer_idx", None)
        if cache is not None and place is not None:
            blank = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
            cache.update(blank, blank, place)
        y = torch.zeros_like(x) if self.term is None else self.term(x)
        return (y, *[None] * (self.outputs - 1)) if self.outputs else y


def find_sublayers(
    blocks: Blocks, calls: list[BlockCall], hidden: Tensor
) -> dict[str, list[Sublayer]]:
    """Return attention and MLP of every block, after a check that they can be left out.

    Parameters
    ----------
    calls, hidden
        Recorded calls of the blocks and the input of the first, ``[batch, length, hidden]``.

    Returns
    -------
    ``attention`` and ``mlp``, each with one sub-layer a block.

    Raises
    ------
    UnsupportedModelError
        When a block has no such part, or when it is more than the sum of its input, its attention
        and its MLP.
    """
    found: dict[str, list[Sublayer]] = {ATTENTION: [], MLP: []}
    for index, (block, call) in enumerate(zip(blocks.modules, calls, strict=True)):
        pair = [_find(blocks, index, kind, call, hidden) for kind in (ATTENTION, MLP)]
        with without(pair[0]), without(pair[1]):
            left = replay(block, call, hidden)
        if not torch.equal(left, hidden):
            raise UnsupportedModelError(
                "sublayer",
                f"a block of {type(block).__name__} without attention and MLP still changes its "
                "input (a norm on the residual stream, or a third part)",
                "blocks that add attention and MLP to what they receive",
                "use sublayer=block",
            )
        found[ATTENTION].append(pair[0])
        found[MLP].append(pair[1])
        hidden = replay(block, call, hidden)
    return found


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among the arguments of a sub-layer."""
    found: Tensor = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
    return found


@contextlib.contextmanager
def without(sublayer: Sublayer, term: nn.Module | None = None) -> Iterator[None]:
    """Leave a sub-layer out for a while, or let a term stand in for it."""
    before = sublayer.modules
    try:
        sublayer.replace(sublayer.stand_ins(term))
        yield
    finally:
        sublayer.replace(before)


def _find(blocks: Blocks, index: int, kind: str, call: BlockCall, hidden: Tensor) -> Sublayer:
    block = blocks.modules[index]
    for members in NAMES[kind]:
        modules = [getattr(block, member, None) for member in members]
        if all(isinstance(module, nn.Module) for module in modules):
            break
    else:
        children = [name for name, _ in block.named_children()]
        raise UnsupportedModelError(
            "sublayer",
            f"no {kind} found in {blocks.path}.{index} ({type(block).__name__})",
            f"its parts: {listed(children)}",
            "use sublayer=block",
        )
    seen: list[Any] = []
    hook = modules[-1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    try:
        replay(block, call, hidden)
    finally:
        hook.remove()
    name = f"{blocks.path}.{index}.{'+'.join(members)}"
    if len(seen) != 1:
        raise UnsupportedModelError(
            "sublayer",
            f"{name} is called {len(seen)} times in one pass",
            "sub-layers that are called once",
            "use sublayer=block",
        )
    outputs = 0 if isinstance(seen[0], Tensor) else len(seen[0])
    return Sublayer(name, block, kind, members, outputs)
