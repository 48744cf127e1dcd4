"""Which layers a recipe means: patterns, the output head, and messages when nothing fits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.layers import (
    CHOSEN,
    HEAD,
    IGNORED,
    NOT_TARGETED,
    ROUTER_NAMES,
    TargetLayer,
    find_layers,
    head_layer,
    is_experts,
    matches,
    matches_any,
)
from lm_calib_plugin.errors import UnsupportedModelError, UserError, listed, nearest


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
        named = [r for r in routers if matches_any(r.name, targets)]
        left = [entry for entry in left if entry[0] not in {r.name for r in named}]
        left += [(x.name, NOT_TARGETED) for x in layers if not matches_any(x.name, targets)]
        layers = sorted([x for x in layers if matches_any(x.name, targets)] + named, key=_order)
    ignored = [x for x in layers if matches_any(x.name, ignore)]
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
        TargetLayer(f"{blocks.path}.{i}.{local}", module, "weight", i)
        for i, block in enumerate(blocks.modules)
        if any(is_experts(m) for m in block.modules())
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
