"""What became of a model: which parts went or were added, which parameters differ. And back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lm_calib_plugin import engine
from lm_calib_plugin.engine.structure import (
    LinearTerm,
    attach,
    delete_blocks,
    first_parameter,
)
from lm_calib_plugin.engine.sublayers import NAMES, StandIn, Sublayer
from lm_calib_plugin.engine.ties import is_tied, untie_head

BEFORE, AFTER = "recovered_before", "recovered_after"
# Parameters of a LinearTerm.
_TERM = ("shift", "down", "up")


class NotKeptError(Exception):
    """A change that an artifact has no words for, and what it is."""


@dataclass(frozen=True, eq=False)
class Dense:
    """What is remembered of a model while it is worked on.

    ``hashes`` are those of its parameters; ``modules`` keeps all modules alive, so that new ones
    are told from old ones.
    """

    hashes: Mapping[str, list[Any]]
    blocks: tuple[nn.Module, ...]
    modules: Mapping[int, nn.Module]
    tied: bool

    @classmethod
    def of(cls, model: nn.Module, blocks: engine.Blocks, hashes: Mapping[str, list[Any]]) -> Dense:
        """Remember a model as it is now."""
        modules = {id(module): module for module in model.modules()}
        return cls(hashes, tuple(blocks.modules), modules, is_tied(model))


@dataclass
class Changes:
    """How a model differs from what it was; everything by name.

    Parameters
    ----------
    kept
        Numbers of the blocks that are left, as they were before; None: all.
    stand_ins
        Sub-layers that were taken out: ``block`` (its number now), ``members``, ``outputs``.
    terms
        Linear terms added to what blocks receive or return: ``block``, ``before``.
    untied
        Whether the output head got a weight of its own.
    biases
        Biases that layers got.
    changed
        Parameters to store: every one that differs, and every new one.
    """

    kept: list[int] | None = None
    stand_ins: list[dict[str, Any]] = field(default_factory=list)
    terms: list[dict[str, Any]] = field(default_factory=list)
    untied: bool = False
    biases: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def find_changes(
    dense: Dense, model: nn.Module, blocks: engine.Blocks, hashes: Mapping[str, list[Any]]
) -> Changes:
    """Compare a model with what it was; ``hashes`` are those of its parameters now.

    Raises
    ------
    NotKeptError
        For a change that :func:`apply_structure` could not make again.
    """
    found = Changes(untied=dense.tied and not is_tied(model))
    places = {id(module): number for number, module in enumerate(dense.blocks)}
    if any(id(block) not in places for block in blocks.modules):
        raise NotKeptError("a block was replaced by another one")
    kept = [places[id(block)] for block in blocks.modules]
    found.kept = None if len(kept) == len(dense.blocks) else kept
    known: set[str] = set()
    for number, block in enumerate(blocks.modules):
        known |= _describe_block(dense, f"{blocks.path}.{number}", number, block, found)
    before = {new: dense.hashes[old] for new, old in _names_after(dense.hashes, blocks.path, kept)}
    _compare(found, model, before, hashes, known)
    return found


def _describe_block(
    dense: Dense, prefix: str, number: int, block: nn.Module, found: Changes
) -> set[str]:
    """Note what is new in a block; return beginnings of names of parameters that came or went."""
    known = set()
    for name, module in block.named_children():
        if id(module) in dense.modules:
            continue
        if isinstance(module, LinearTerm) and name.rstrip("_") in (BEFORE, AFTER):
            found.terms.append({"block": number, "before": name.startswith(BEFORE)})
        elif isinstance(module, StandIn):
            members = _members(block, name, dense)
            found.stand_ins.append({"block": number, "members": members, "outputs": module.outputs})
            known |= {f"{prefix}.{member}." for member in members}
        elif not isinstance(module, nn.Identity):
            raise NotKeptError(f"{prefix}.{name} ({type(module).__name__}) is new")
        known.add(f"{prefix}.{name}.")
    return known


def _members(block: nn.Module, last: str, dense: Dense) -> list[str]:
    """Return the names of the modules in whose place a stand-in stands."""
    for chains in NAMES.values():
        for chain in chains:
            parts = [getattr(block, name, None) for name in chain]
            if chain[-1] == last and all(id(p) not in dense.modules for p in parts):
                return list(chain)
    raise NotKeptError(f"{last} stands in for something unknown")


def _names_after(names: Any, path: str, kept: Sequence[int]) -> list[tuple[str, str]]:
    """Return (name now, name before) of all parameters but those of blocks that went."""
    place = {str(old): str(new) for new, old in enumerate(kept)}
    found = []
    for name in names:
        if not name.startswith(f"{path}."):
            found.append((name, name))
            continue
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        if number in place:
            found.append((f"{path}.{place[number]}.{rest}", name))
    return found


def _compare(
    found: Changes,
    model: nn.Module,
    before: Mapping[str, list[Any]],
    now: Mapping[str, list[Any]],
    known: set[str],
) -> None:
    head = f"{_head_name(model)}.weight" if found.untied else None
    for name, facts in now.items():
        if name in before:
            if facts[:2] != before[name][:2]:
                raise NotKeptError(f"{name} has another shape or dtype")
            if facts != before[name]:
                found.changed.append(name)
            continue
        new_bias = name.endswith(".bias") and isinstance(_owner(model, name), nn.Linear)
        if new_bias and not any(name.startswith(part) for part in known):
            found.biases.append(name)
        elif name != head and not any(name.startswith(part) for part in known):
            raise NotKeptError(f"the parameter {name} is new")
        found.changed.append(name)
    if found.biases and found.kept is not None:
        raise NotKeptError("blocks are gone, and others got biases")
    for name in before.keys() - now.keys():
        if not any(name.startswith(part) for part in known):
            raise NotKeptError(f"the parameter {name} is gone")


# --- and back ------------------------------------------------------------------------------------


def check_changes(
    model: nn.Module,
    blocks: engine.Blocks,
    changes: Changes,
    stored: Mapping[str, tuple[list[int], str]],
) -> None:
    """Make sure that changes fit a dense model, before anything is done to it.

    ``stored`` has shape and dtype of every parameter that was kept.

    Raises
    ------
    ValueError
        When they do not.
    """
    depth = len(blocks)
    kept = list(range(depth)) if changes.kept is None else changes.kept
    if kept != sorted(set(kept)) or not set(kept) <= set(range(depth)) or not kept:
        raise ValueError(f"blocks {kept} of {depth}")
    if set(changes.changed) != set(stored):
        raise ValueError("other parameters than listed")
    live = dict(model.named_parameters())
    there = {new: live[old] for new, old in _names_after(live, blocks.path, kept)}
    new = {name for name in stored if name not in there}
    for name in stored.keys() & there.keys():
        mine = (list(there[name].shape), str(there[name].dtype))
        if mine != stored[name]:
            raise ValueError(f"{name} is {stored[name]}, here it is {mine}")
    explained = set(changes.biases)
    if changes.untied:
        explained.add(f"{_head_name(model)}.weight")
    for place in _places(blocks, changes, kept):
        explained |= {name for name in new if name.startswith(f"{place}.")}
    if new != explained & new or not set(changes.biases) <= new:
        raise ValueError(f"no place for {sorted(new - explained)[:3]}")
    for name in changes.biases:
        owner = _owner(model, name) if changes.kept is None else None
        if not isinstance(owner, nn.Linear) or owner.bias is not None:
            raise ValueError(f"no place for {name}")


def _places(blocks: engine.Blocks, changes: Changes, kept: Sequence[int]) -> list[str]:
    """Return where modules are put, after a check that there are such blocks and members."""
    found = []
    for term in changes.terms:
        if not 0 <= term["block"] < len(kept) or type(term["before"]) is not bool:
            raise ValueError(f"no block {term['block']}")
        found.append(f"{blocks.path}.{term['block']}.{BEFORE if term['before'] else AFTER}")
    chains = [chain for own in NAMES.values() for chain in own]
    for part in changes.stand_ins:
        block, members = part["block"], tuple(part["members"])
        if not 0 <= block < len(kept) or members not in chains or type(part["outputs"]) is not int:
            raise ValueError(f"no sub-layer {members} in block {block}")
        module = blocks.modules[kept[block]]
        if not all(isinstance(getattr(module, member, None), nn.Module) for member in members):
            raise ValueError(f"no sub-layer {members} in block {block}")
        found.append(f"{blocks.path}.{block}.{members[-1]}.term")
    return found


def apply_structure(
    model: nn.Module, blocks: engine.Blocks, changes: Changes, tensors: Mapping[str, Tensor]
) -> None:
    """Take out and put in what the changes say; values are not written yet.

    ``tensors`` holds the parameters of new modules, by name.
    """
    if changes.kept is not None:
        gone = sorted(set(range(len(blocks))) - set(changes.kept))
        delete_blocks(model, blocks, gone)
    for part in changes.stand_ins:
        block, members = blocks.modules[part["block"]], tuple(part["members"])
        name = f"{blocks.path}.{part['block']}.{members[-1]}.term"
        sublayer = Sublayer(name, block, "", members, part["outputs"])
        sublayer.replace(sublayer.stand_ins(_term(block, name, tensors)))
    for part in changes.terms:
        block = blocks.modules[part["block"]]
        kind = BEFORE if part["before"] else AFTER
        term = _term(block, f"{blocks.path}.{part['block']}.{kind}", tensors)
        if term is not None:
            attach(block, term, before=part["before"])
    if changes.untied:
        untie_head(model)
    for name in changes.biases:
        owner = _owner(model, name)
        like = owner.weight
        value = tensors[name].to(like.device, like.dtype)
        owner.bias = nn.Parameter(value, requires_grad=like.requires_grad)


def _term(block: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> LinearTerm | None:
    parts = [tensors.get(f"{name}.{part}") for part in _TERM]
    if parts[0] is None:
        return None
    return LinearTerm(parts[0], parts[1], parts[2], first_parameter(block))


def _head_name(model: nn.Module) -> str:
    head = model.get_output_embeddings()  # type: ignore[operator]
    names: list[str] = [name for name, module in model.named_modules() if module is head]
    return names[0]


def _owner(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None
