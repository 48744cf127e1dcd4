"""Take blocks out of a model for good, and put small terms in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine.discovery import Blocks, text_config
from lm_calib_plugin.errors import UnsupportedModelError

# Names of the number that ties an attention module to its place in the key/value cache.
PLACES = ("layer_idx", "layer_id", "layer_number")
# Lists of block numbers; every other list of as many entries as blocks has one entry a block.
NUMBERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs")
SHARING = ("num_kv_shared_layers", "use_cla", "kv_sharing_modes")


class LinearTerm(nn.Module):
    """``x -> up (down x) + shift``, in the dtype of the model.

    Parameters
    ----------
    shift
        ``[out]``.
    down, up
        ``[rank, in]`` and ``[out, rank]``, or None for a constant.
    like
        A parameter whose dtype and device are used.
    """

    def __init__(
        self, shift: Tensor, down: Tensor | None, up: Tensor | None, like: nn.Parameter
    ) -> None:
        super().__init__()

        def stored(value: Tensor | None) -> nn.Parameter | None:
            if value is None:
                return None
            return nn.Parameter(value.to(like.device, like.dtype), requires_grad=like.requires_grad)

        self.shift, self.down, self.up = stored(shift), stored(down), stored(up)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return what stands in for the removed part on input ``x`` (``[..., in]``)."""
        if self.down is None:
            # A tensor of its own: some blocks add to what their parts return in place.
            return self.shift.expand(*x.shape[:-1], -1).clone()
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.shift)

    def added_after(self, _block: nn.Module, _args: Any, output: Any) -> Any:
        """Add the term to what a block returns; a forward hook."""
        if isinstance(output, Tensor):
            return output + self(output)
        return type(output)((output[0] + self(output[0]), *output[1:]))

    def added_before(self, _block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Add the term to what a block receives; a forward hook on its arguments."""
        if args:
            return (args[0] + self(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: kwargs[name] + self(kwargs[name])}


def attach(block: nn.Module, term: LinearTerm, before: bool = False) -> None:
    """Make a term part of a block: added to its output, or to its input.

    The term is a submodule (``recovered_after``, ``recovered_before``), so it is stored, moved and
    copied with the block.
    """
    name = "recovered_before" if before else "recovered_after"
    while hasattr(block, name):
        name += "_"
    block.add_module(name, term)
    if before:
        block.register_forward_pre_hook(term.added_before, with_kwargs=True)
    else:
        block.register_forward_hook(term.added_after)


def check_separable(model: nn.Module, blocks: Blocks) -> None:
    """Refuse models in which a block can not be missed: those that share something.

    Raises
    ------
    UnsupportedModelError
        When blocks share keys and values, or weights.
    """
    config = text_config(getattr(model, "config", None))
    name = type(model).__name__
    for setting in SHARING:
        value = getattr(config, setting, None)
        if value:
            raise UnsupportedModelError(
                "model",
                f"{name} shares keys and values between blocks ({setting}={value})",
                "models whose blocks do not need each other",
            )
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks.modules):
        for local, parameter in block.named_parameters():
            if owner.setdefault(id(parameter), index) != index:
                raise UnsupportedModelError(
                    "model",
                    f"blocks {owner[id(parameter)]} and {index} of {name} share `{local}`",
                    "every block needs weights of its own",
                )


def delete_blocks(model: nn.Module, blocks: Blocks, removed: Sequence[int]) -> None:
    """Delete blocks and make the rest a consistent model of fewer blocks.

    Renumbered are the places in the key/value cache; the configuration gets the new depth, and
    its lists with one entry a block lose those of the removed blocks.
    """
    depth, gone = len(blocks), set(removed)
    kept = [i for i in range(depth) if i not in gone]
    for new, old in enumerate(kept):
        _renumber(blocks.modules[old], new - old)
    for index in sorted(gone, reverse=True):
        del blocks.modules[index]
    for config in _configs(model):
        _shorten(config, depth, kept)


def _renumber(block: nn.Module, shift: int) -> None:
    if not shift:
        return
    for module in block.modules():
        for name in PLACES:
            value = module.__dict__.get(name)
            if type(value) is int:
                setattr(module, name, value + shift)


def _configs(model: nn.Module) -> list[Any]:
    """Return every distinct configuration object that modules of the model hold."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            for part in (config, text_config(config)):
                found.setdefault(id(part), part)
    return list(found.values())


def _shorten(config: Any, depth: int, kept: Sequence[int]) -> None:
    if getattr(config, "num_hidden_layers", None) != depth:
        return
    place = {old: new for new, old in enumerate(kept)}
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if not isinstance(value, (list, tuple)):
            continue
        if name in NUMBERS:
            changes[name] = type(value)(place[i] for i in value if i in place)
        elif len(value) == depth and ("layer" in name or "block" in name):
            changes[name] = type(value)(value[i] for i in kept)
    config.num_hidden_layers = len(kept)
    for name, value in changes.items():
        setattr(config, name, value)


def parameters(module: nn.Module) -> int:
    """Count the parameters of a module, each once."""
    return sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())


def runs(removed: Sequence[int]) -> list[range]:
    """Return the removed numbers as runs of consecutive ones."""
    found: list[range] = []
    for index in sorted(removed):
        if found and found[-1].stop == index:
            found[-1] = range(found[-1].start, index + 1)
        else:
            found.append(range(index, index + 1))
    return found


def first_parameter(module: nn.Module) -> nn.Parameter:
    """Return a floating-point parameter of a module, to learn its dtype and device."""
    return next(p for p in module.parameters() if torch.is_floating_point(p))
