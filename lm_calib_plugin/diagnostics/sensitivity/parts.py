"""Groups of layers that a question can be asked of: components, halves, ends, single blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lm_calib_plugin import engine
from lm_calib_plugin.engine.sublayers import ATTENTION, MLP, NAMES
from lm_calib_plugin.errors import UserError, listed, nearest

COMPONENT, HALF, END, BLOCK = "component", "half", "end", "block"
# What the last part of a name stands for in the literature, whatever the architecture calls it.
_ROLES = {
    "q": ("q_proj", "query", "wq"),
    "k": ("k_proj", "key", "wk"),
    "v": ("v_proj", "value", "wv"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "fc1", "c_fc", "dense_h_to_4h"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "w2", "fc2", "dense_4h_to_h"),
}
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@dataclass(frozen=True)
class Group:
    """Layers that are left dense, or compressed, together.

    ``kind`` is ``component`` (equal names in all blocks), ``half`` (all of attention, all of the
    MLPs), ``end`` (first and last blocks) or ``block``; ``role`` says what a component does: ``q``,
    ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``, several of these in one, or nothing known.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    role: str = ""


def component_groups(
    layers: Sequence[engine.TargetLayer], blocks: engine.Blocks, ends: int | None = None
) -> list[Group]:
    """Return components, attention, MLP, and the first and last blocks.

    Parameters
    ----------
    layers
        What is compressed.
    ends
        Blocks in the first and in the last ones; None: 2, or 1 in models of fewer than 6.

    Raises
    ------
    UserError
        When everything that is compressed is one part, so that there is nothing to leave out.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for layer in layers:
        local = local_name(layer, blocks)
        found.setdefault((local, COMPONENT, role_of(local)), []).append(layer.name)
    for half in (ATTENTION, MLP):
        own = [layer.name for layer in layers if half_of(local_name(layer, blocks)) == half]
        found[half, HALF, ""] = own
    depth = len(blocks)
    count = ends or (2 if depth >= 6 else 1)
    words = "block" if count == 1 else f"{count} blocks"
    for title, numbers in (("first", range(count)), ("last", range(depth - count, depth))):
        own = [layer.name for layer in layers if layer.block in numbers]
        found[f"{title} {words}", END, ""] = own
    groups = [Group(name, kind, tuple(own), role) for (name, kind, role), own in found.items()]
    return _telling(groups, len(layers))


def block_groups(layers: Sequence[engine.TargetLayer], blocks: engine.Blocks) -> list[Group]:
    """Return one group a block with layers in it.

    Raises
    ------
    UserError
        As for :func:`component_groups`.
    """
    groups = [
        Group(f"block {i}", BLOCK, tuple(layer.name for layer in layers if layer.block == i))
        for i in range(len(blocks))
    ]
    return _telling(groups, len(layers))


def chosen_layers(
    patterns: Sequence[str] | None,
    layers: Sequence[engine.TargetLayer],
    blocks: engine.Blocks,
    argument: str = "noise_layers",
) -> list[engine.TargetLayer]:
    """Return the layers that patterns mean; ``attention`` and ``mlp`` mean all layers in these.

    Raises
    ------
    UserError
        For a pattern that means none.
    """
    if patterns is None:
        return list(layers)
    picked: set[str] = set()
    for pattern in patterns:
        if pattern in (ATTENTION, MLP):
            own = [x.name for x in layers if half_of(local_name(x, blocks)) == pattern]
        else:
            own = [x.name for x in layers if engine.matches(x.name, pattern)]
        if not own:
            tails = list(dict.fromkeys(x.name.rsplit(".", 1)[-1] for x in layers))
            raise UserError(
                argument,
                f"`{pattern}` means 0 of {len(layers)} layers",
                nearest(pattern.strip("*."), [*tails, ATTENTION, MLP]),
                f"{ATTENTION}, {MLP}, or names: {listed(tails)}",
            )
        picked |= set(own)
    return [layer for layer in layers if layer.name in picked]


def local_name(layer: engine.TargetLayer, blocks: engine.Blocks) -> str:
    """Return the name inside the block, without numbers of experts; that of the head is whole."""
    name = layer.name.removeprefix(f"{blocks.path}.{layer.block}.")
    return ".".join(part for part in name.split(".") if not part.isdigit())


def half_of(local: str) -> str | None:
    """Return ``attention`` or ``mlp``, by the first part of a name inside a block, or None."""
    first = local.partition(".")[0]
    for kind, chains in NAMES.items():
        if any(first in chain for chain in chains):
            return kind
    return None


def role_of(local: str) -> str:
    """Return what a layer of this name inside a block does, or nothing."""
    tail = local.rpartition(".")[2]
    for role, tails in _ROLES.items():
        if tail in tails:
            return role
    if tail in _OUTPUTS:
        return {ATTENTION: "o", MLP: "down"}.get(half_of(local) or "", "")
    return ""


def _telling(groups: Sequence[Group], count: int) -> list[Group]:
    """Return the groups that are neither empty, nor everything, nor another one once more."""
    seen: set[frozenset[str]] = set()
    kept = []
    for group in groups:
        members = frozenset(group.layers)
        if members and len(members) < count and members not in seen:
            seen.add(members)
            kept.append(group)
    if not kept:
        raise UserError(
            "targets",
            "everything that is compressed is one part of the model",
            "two parts or more: one is left out at a time",
            "name more layers",
        )
    return kept
