"""Views of the weights that can be compressed: linear layers, Conv1D, experts of fused MoE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.errors import UnsupportedModelError, UserError, listed, nearest

ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
HEAD = -1
# Reasons of the user's own choosing; any other reason is worth a warning.
NOT_TARGETED, IGNORED = "not in targets", "in ignore"
CHOSEN = (NOT_TARGETED, IGNORED)


@dataclass(frozen=True, eq=False)
class TargetLayer:
    """One weight matrix inside a model, seen as ``[out, in]``.

    ``module`` receives the input (the linear layer itself, or the module that holds all experts);
    ``parameter`` is the tensor that stores the weight, ``expert`` the index in its first
    dimension, ``transposed`` whether it is stored ``[in, out]``. ``block`` is the number of the
    decoder block, or -1 for the output head. ``part`` is ``""`` for linear layers and
    ``gate_up``, ``up`` or ``down`` for experts.
    """

    name: str
    module: nn.Module
    parameter: nn.Parameter
    block: int
    transposed: bool = False
    expert: int | None = None
    part: str = ""

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
        return self.weight.detach().to(torch.float32, copy=True).contiguous()

    def write(self, weight: Tensor) -> None:
        """Cast ``weight`` (``[out, in]``, float32) once to the model's dtype and store it."""
        value = weight.to(self.parameter.dtype)
        self.stored.copy_(value.t() if self.transposed else value)


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
        has_experts = any(_is_experts(m) for m in block.modules())
        claimed: set[int] = set()
        for local, module in block.named_modules():
            name = f"{prefix}.{local}" if local else prefix
            if isinstance(module, (nn.Linear, Conv1D)):
                claimed.add(id(module.weight))
                if has_experts and local.rsplit(".", 1)[-1] in ROUTER_NAMES:
                    left.append((name, "router of experts"))
                    continue
                transposed = isinstance(module, Conv1D)
                layers.append(TargetLayer(name, module, module.weight, index, transposed))
            elif _is_experts(module) and not _known_experts(module) and _any(name, ignore):
                claimed |= {id(p) for p in module.parameters()}
                left.append((name, IGNORED))
            elif _is_experts(module):
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
    if _is_tied(model, head) and not untie:
        raise UserError(
            "targets",
            f"{name} and the input embeddings share one tensor",
            "compressing it changes both",
            f"untie=true, or drop {name}",
        )
    return TargetLayer(name, head, head.weight, HEAD)


def _is_tied(model: Any, head: nn.Linear) -> bool:
    embeddings = model.get_input_embeddings()
    return embeddings is not None and head.weight is embeddings.weight


def untied(model: Any, layers: Sequence[TargetLayer]) -> list[TargetLayer]:
    """Give a tied head that is among the layers a weight of its own; return the layers anew."""
    result = []
    for layer in layers:
        if layer.block == HEAD and _is_tied(model, layer.module):
            old = layer.parameter
            own = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            layer.module.weight = own
            model.config.tie_word_embeddings = False
            layer = replace(layer, parameter=own)
        result.append(layer)
    return result


def select_layers(
    model: nn.Module,
    blocks: Blocks,
    targets: Sequence[str] | None,
    ignore: Sequence[str],
    untie: bool = False,
) -> tuple[list[TargetLayer], list[tuple[str, str]]]:
    """Pick the layers to compress.

    Parameters
    ----------
    targets
        Name patterns (``*`` and ``?``), matched against the whole name or its last parts; None
        means every linear layer of the blocks.
    ignore
        Patterns of layers to leave as they are.

    Returns
    -------
    layers, left_dense
        What is compressed, and ``(name, why)`` of every matrix in the blocks that is not.

    Raises
    ------
    UserError
        When a pattern matches nothing or nothing is left.
    """
    layers, left = find_layers(blocks, ignore)
    everything = layers
    if not layers:
        raise UnsupportedModelError(
            "model", f"no linear layer in the blocks `{blocks.path}` of {type(model).__name__}"
        )
    wants_head = targets is not None and _names_head(model, targets)
    if wants_head:
        head = head_layer(model, untie)
        if head is not None:
            layers = [*layers, head]
    elif untie:
        raise UserError(
            "untie",
            "the output head is not among the targets",
            fix="add it, for instance targets=*proj+lm_head, or drop untie",
        )
    routers = _routers(blocks) if targets is not None else []
    for pattern in [*(targets or ()), *ignore]:
        names = [layer.name for layer in [*layers, *routers]] + [name for name, _ in left]
        if not any(matches(name, pattern) for name in names):
            raise _matched_nothing(model, pattern, layers, pattern in ignore)
    if targets is not None:
        named = [r for r in routers if _any(r.name, targets)]
        left = [entry for entry in left if entry[0] not in {r.name for r in named}]
        left += [(x.name, NOT_TARGETED) for x in layers if not _any(x.name, targets)]
        layers = sorted([x for x in layers if _any(x.name, targets)] + named, key=_order)
    ignored = [x for x in layers if _any(x.name, ignore)]
    left += [(x.name, IGNORED) for x in ignored]
    dropped = {id(x) for x in ignored}
    layers = [x for x in layers if id(x) not in dropped]
    if not layers and not ignored:
        raise UserError(
            "targets",
            f"`{'+'.join(targets or ())}` names only matrices that are not linear layers",
            f"what they are: {listed(sorted({why for _, why in left if why not in CHOSEN}))}",
            f"linear layers: {listed(_tails(everything))}",
        )
    if not layers:
        raise UserError(
            "ignore", "the patterns exclude every layer", fix="drop a pattern of `ignore`"
        )
    return layers, left


def matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern matches a layer name or a dotted tail of it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(matches(name, pattern) for pattern in patterns)


def _order(layer: TargetLayer) -> int:
    return layer.block if layer.block != HEAD else 1 << 30


def _names_head(model: nn.Module, targets: Sequence[str]) -> bool:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    names = [n for n, m in model.named_modules() if m is head]
    # A bare star stands for the layers of the blocks; the head has to be named.
    return any(matches(n, p) for n in names for p in targets if p.strip("*.?"))


def _routers(blocks: Blocks) -> list[TargetLayer]:
    return [
        TargetLayer(f"{blocks.path}.{i}.{local}", module, module.weight, i)
        for i, block in enumerate(blocks.modules)
        if any(_is_experts(m) for m in block.modules())
        for local, module in block.named_modules()
        if isinstance(module, nn.Linear) and local.rsplit(".", 1)[-1] in ROUTER_NAMES
    ]


def _tails(layers: Sequence[TargetLayer]) -> list[str]:
    return list(dict.fromkeys(layer.name.rsplit(".", 1)[-1] for layer in layers))


def _matched_nothing(
    model: nn.Module, pattern: str, layers: Sequence[TargetLayer], ignoring: bool
) -> UserError:
    tails = _tails(layers)
    argument = "ignore" if ignoring else "targets"
    tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    if any(matches(n, pattern) for n in tables):
        return UserError(
            argument,
            f"`{pattern}` is an embedding table",
            "only linear layers are compressed",
            "the output head can be named instead, with untie=true when it is tied",
        )
    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    if any(matches(n, pattern) for n in linear):
        return UserError(
            argument,
            f"`{pattern}` names a linear layer outside the decoder blocks",
            "layers of the blocks, and the output head",
        )
    return UserError(
        argument,
        f"pattern `{pattern}` matched 0 of {len(layers)} linear layers",
        nearest(pattern.strip("*."), tails),
        f"names: {listed(tails)}",
    )


def _is_experts(module: nn.Module) -> bool:
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
            getattr(module, attribute),
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
        if parameter.dim() > 2 and not _any(name, ignore):
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
        key = (id(layer.parameter), layer.expert)
        if key in seen:
            raise UnsupportedModelError(
                "model",
                f"{seen[key]} and {layer.name} share one weight",
                "every block needs weights of its own",
            )
        seen[key] = layer.name
