"""Views of the weights that can be compressed: linear layers, Conv1D, experts of fused MoE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.residence import value_of
from lm_calib_plugin.engine.ties import is_tied, untie_head
from lm_calib_plugin.errors import UnsupportedModelError, UserError
from lm_calib_plugin.placement import execution_device

ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
HEAD = -1
# Reasons of the user's own choosing; any other reason is worth a warning.
NOT_TARGETED, IGNORED = "not in targets", "in ignore"
CHOSEN = (NOT_TARGETED, IGNORED)


@dataclass(frozen=True, eq=False)
class TargetLayer:
    """One weight matrix inside a model, seen as ``[out, in]``.

    ``module`` receives the input (the linear layer itself, or the module that holds all experts);
    ``attribute`` is the name under which it stores the weight, ``expert`` the index in the first
    dimension of that, ``transposed`` whether it is stored ``[in, out]``. ``block`` is the number
    of the decoder block, or -1 for the output head. ``part`` is ``""`` for linear layers and
    ``gate_up``, ``up`` or ``down`` for experts.

    Values of a weight that is offloaded can be seen and changed where its block is
    :func:`~lm_calib_plugin.engine.residence.resident`, and read anywhere.
    """

    name: str
    module: nn.Module
    attribute: str
    block: int
    transposed: bool = False
    expert: int | None = None
    part: str = ""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that stores the weight, as it is now: hooks may put others in place."""
        found: nn.Parameter = getattr(self.module, self.attribute)
        return found

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return execution_device(self.module)

    @property
    def place(self) -> tuple[int, str]:
        """What tells the parameter from any other, as long as the model lives."""
        return id(self.module), self.attribute

    @property
    def stored(self) -> Tensor:
        """The live tensor, as it is stored."""
        data = self.parameter.data
        return data if self.expert is None else data[self.expert]

    @property
    def weight(self) -> Tensor:
        """The live tensor as ``[out, in]`` (a view)."""
        return self.stored.t() if self.transposed else self.stored

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        out, width = self.weight.shape
        return int(out), int(width)

    def read(self) -> Tensor:
        """Return a float32 copy, ``[out, in]``, contiguous."""
        stored = value_of(self.module, self.attribute)
        stored = stored if self.expert is None else stored[self.expert]
        weight = stored.t() if self.transposed else stored
        return weight.to(self.device, torch.float32, copy=True).contiguous()

    def write(self, weight: Tensor) -> None:
        """Cast ``weight`` (``[out, in]``, float32) once to the model's dtype and store it."""
        # No -0.0: an exported folder, whose levels are integers, holds the very same numbers.
        value = weight.to(self.parameter.dtype) + 0
        self.stored.copy_(value.t() if self.transposed else value)

    @property
    def bias(self) -> Tensor | None:
        """The live bias ``[out]`` of the layer, None where there is none."""
        name = "bias"
        if self.expert is not None:
            name = ("down_proj" if self.part == "down" else f"{self.part}_proj") + "_bias"
        found = getattr(self.module, name, None)
        if not isinstance(found, Tensor):
            return None
        return found.data if self.expert is None else found.data[self.expert]

    def add_to_bias(self, change: Tensor) -> None:
        """Add ``change`` (``[out]``, float32) to the bias, cast once to its dtype."""
        bias = self.bias
        if bias is None:
            raise ValueError(f"{self.name} has no bias")
        bias.copy_((bias.float() + change.to(bias.device)).to(bias.dtype))


def by_module(layers: Iterable[TargetLayer]) -> list[list[TargetLayer]]:
    """Return the layers, those that one module holds together."""
    found: dict[int, list[TargetLayer]] = {}
    for layer in layers:
        found.setdefault(id(layer.module), []).append(layer)
    return list(found.values())


def matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern matches a layer name or a dotted tail of it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether any of the patterns matches a layer name."""
    return any(matches(name, pattern) for pattern in patterns)


def find_layers(
    blocks: Blocks, ignore: Sequence[str] = ()
) -> tuple[list[TargetLayer], list[tuple[str, str]]]:
    """List every compressible weight of the blocks, and every other matrix with the reason.

    Experts stored in an unknown way are refused unless ``ignore`` names them.

    Returns
    -------
    layers
        In the order of the model.
    left_dense
        ``(name, why)`` of matrices inside the blocks that are not compressed by default.
    """
    layers: list[TargetLayer] = []
    left: list[tuple[str, str]] = []
    for index, block in enumerate(blocks.modules):
        prefix = f"{blocks.path}.{index}"
        has_experts = any(is_experts(m) for m in block.modules())
        claimed: set[int] = set()
        for local, module in block.named_modules():
            name = f"{prefix}.{local}" if local else prefix
            if isinstance(module, (nn.Linear, Conv1D)):
                claimed.add(id(module.weight))
                if has_experts and local.rsplit(".", 1)[-1] in ROUTER_NAMES:
                    left.append((name, "router of experts"))
                    continue
                transposed = isinstance(module, Conv1D)
                layers.append(TargetLayer(name, module, "weight", index, transposed))
            elif is_experts(module) and not _known_experts(module) and matches_any(name, ignore):
                claimed |= {id(p) for p in module.parameters()}
                left.append((name, IGNORED))
            elif is_experts(module):
                found = _expert_layers(name, module, index)
                claimed |= {id(layer.parameter) for layer in found}
                layers += found
        left += _unclaimed(prefix, block, claimed, ignore)
    _refuse_shared(layers)
    return layers, left


def head_layer(model: nn.Module, untie: bool) -> TargetLayer | None:
    """Return the output head as a layer; a tied one is refused unless ``untie`` is set."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    if not isinstance(head, nn.Linear):
        return None
    name = next(n for n, m in model.named_modules() if m is head)
    if is_tied(model) and not untie:
        raise UserError(
            "targets",
            f"{name} and the input embeddings share one tensor",
            "compressing it changes both",
            f"untie=true, or drop {name}",
        )
    return TargetLayer(name, head, "weight", HEAD)


def untied(model: Any, layers: Sequence[TargetLayer]) -> Callable[[], None]:
    """Give a tied head that is among the layers a weight of its own.

    Returns
    -------
    callable
        Ties it again; for an error that comes before the weight is used.
    """
    if any(layer.block == HEAD for layer in layers) and is_tied(model):
        return untie_head(model)
    return lambda: None


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module holds the weights of several experts in one tensor."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3


def _known_experts(module: Any) -> bool:
    flags = all(hasattr(module, a) for a in ("is_transposed", "has_gate", "has_bias"))
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    return flags and hasattr(module, first) and not getattr(module, "has_post_expert_norm", False)


def _expert_layers(name: str, module: Any, block: int) -> list[TargetLayer]:
    if not _known_experts(module):
        raise UnsupportedModelError(
            "model",
            f"{name} ({type(module).__name__}) stores experts in an unknown way",
            "experts with the common interface of transformers 5",
            "leave them dense with ignore=*experts*",
        )
    first = "gate_up_proj" if module.has_gate else "up_proj"
    part = first.removesuffix("_proj")
    return [
        TargetLayer(
            f"{name}.{e}.{attribute}",
            module,
            attribute,
            block,
            bool(module.is_transposed),
            e,
            kind,
        )
        for e in range(module.down_proj.shape[0])
        for attribute, kind in ((first, part), ("down_proj", "down"))
    ]


def _unclaimed(
    prefix: str, block: nn.Module, claimed: set[int], ignore: Sequence[str]
) -> list[tuple[str, str]]:
    left = []
    for local, parameter in block.named_parameters():
        if parameter.dim() < 2 or id(parameter) in claimed:
            continue
        owner = type(block.get_submodule(local.rpartition(".")[0])).__name__
        name = f"{prefix}.{local}"
        if parameter.dim() > 2 and not matches_any(name, ignore):
            raise UnsupportedModelError(
                "model",
                f"{name} ({owner}) has {parameter.dim()} dimensions",
                "linear layers, and experts with the common interface of transformers 5",
                f"leave it dense with ignore=*{local}",
            )
        reason = f"{owner}, not a linear layer" if parameter.dim() == 2 else IGNORED
        left.append((name, reason))
    return left


def _refuse_shared(layers: Sequence[TargetLayer]) -> None:
    seen: dict[tuple[int, int | None], str] = {}
    for layer in layers:
        # Of tensors that are away only the places can be told apart, and those differ.
        key = (id(layer.parameter), layer.expert)
        if key in seen:
            raise UnsupportedModelError(
                "model",
                f"{seen[key]} and {layer.name} share one weight",
                "every block needs weights of its own",
            )
        seen[key] = layer.name
