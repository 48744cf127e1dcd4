"""Heads and neurons of a model: where they are, what they carry, and how to silence them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.dense import dense_pass
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.errors import NumericalError, UnsupportedModelError, listed
from lm_calib_plugin.statistics.joint import ChannelVariance

SPLIT = (
    "blocks with q_proj, k_proj, v_proj, o_proj and (gate_proj,) up_proj, down_proj, or fc1, fc2"
)
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
OUTPUTS = ("o_proj", "out_proj")
MLPS = (("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj"), ("fc1", "fc2"))


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """The heads, or the neurons, of one block.

    A unit is ``width`` consecutive inputs of ``output`` (a key/value head with all query heads that
    share it, or one neuron) together with the rows of ``sources`` that only it needs:
    ``rows[i]`` consecutive rows of ``sources[i]``.
    """

    name: str
    attention: bool
    output: TargetLayer
    sources: tuple[nn.Linear, ...]
    rows: tuple[int, ...]
    width: int

    @property
    def linear(self) -> nn.Linear:
        """The live output projection."""
        module = self.output.module
        assert isinstance(module, nn.Linear)
        return module

    @property
    def units(self) -> int:
        """How many there are."""
        return self.linear.in_features // self.width

    @property
    def size(self) -> int:
        """Parameters that go with one unit, biases of the sources included."""
        sources = sum(
            rows * (module.in_features + (module.bias is not None))
            for module, rows in zip(self.sources, self.rows, strict=True)
        )
        return sources + self.width * self.linear.out_features

    def columns(self, removed: Tensor) -> Tensor:
        """Return which inputs of ``output`` belong to removed units, ``[in]`` boolean."""
        return removed.repeat_interleave(self.width)

    def silence(self, removed: Tensor) -> None:
        """Set to zero every weight that belongs to removed units (boolean ``[units]``)."""
        where = removed.to(self.linear.weight.device)
        self.linear.weight.data[:, self.columns(where)] = 0
        for module, rows in zip(self.sources, self.rows, strict=True):
            gone = removed.to(module.weight.device).repeat_interleave(rows)
            module.weight.data[gone] = 0
            if module.bias is not None:
                module.bias.data[gone] = 0

    def silent(self) -> Tensor:
        """Return which units are zero in the live weights, boolean ``[units]``."""
        found = (self.linear.weight == 0).all(dim=0).reshape(-1, self.width).all(dim=1)
        for module, rows in zip(self.sources, self.rows, strict=True):
            zero = (module.weight == 0).all(dim=1).to(found.device)
            found = found & zero.reshape(-1, rows).all(dim=1)
        return found.cpu()


def find_units(blocks: Blocks) -> list[UnitGroup]:
    """Return heads and neurons of every block, block by block.

    Raises
    ------
    UnsupportedModelError
        When a block is not made of separate projections as expected; it is named.
    """
    found = []
    for index, block in enumerate(blocks.modules):
        prefix = f"{blocks.path}.{index}"
        groups = [_heads(prefix, index, block), _neurons(prefix, index, block)]
        claimed = {id(m) for g in groups for m in (*g.sources, g.linear)}
        other = [
            local
            for local, module in block.named_modules()
            if local and id(module) not in claimed and _has_matrix(module)
        ]
        if other:
            raise _refused(prefix, block, f"has other matrices: {listed(other[:4])}")
        found += groups
    return found


def add_bias(linear: nn.Linear, shift: Tensor) -> int:
    """Add ``shift`` ``[out]`` to the bias, which is made when there is none.

    Returns
    -------
    Number of parameters that were added.
    """
    weight = linear.weight
    if linear.bias is not None:
        total = linear.bias.data.double() + shift.to(weight.device).double()
        linear.bias.data.copy_(total.to(weight.dtype))
        return 0
    value = shift.to(weight.device, weight.dtype)
    linear.bias = nn.Parameter(value, requires_grad=weight.requires_grad)
    return value.numel()


@dataclass
class _Variances:
    """Visitor that keeps mean and variance of every channel of every output projection."""

    found: dict[str, ChannelVariance] = field(default_factory=dict)

    def wants(self, index: int) -> bool:
        return True

    def start(self, index: int, groups: Sequence[Sequence[TargetLayer]]) -> list[ChannelVariance]:
        return [ChannelVariance(g[0].shape[1], g[0].device) for g in groups]

    def listen(self, state: Any, chunk: Chunk, number: int, rows: Tensor, owners: Tensor) -> None:
        if not chunk.heldout:
            weights = None if chunk.weights is None else chunk.weights.double()[owners]
            state[number].update(rows, weights)

    def finish(self, index: int, groups: Sequence[Sequence[TargetLayer]], state: Any) -> None:
        for group, seen in zip(groups, state, strict=True):
            for layer in group:
                if not seen.is_finite():
                    raise NumericalError(
                        layer.name, "calibration input", "NaN or Inf in the activations"
                    )
                self.found[layer.name] = seen


def channel_variances(
    model: nn.Module,
    blocks: Blocks,
    chunks: list[Chunk],
    units: Sequence[UnitGroup],
    device: torch.device,
    progress: bool,
) -> tuple[dict[str, ChannelVariance], Any]:
    """Return mean and variance of the inputs of every output projection, and the pass made."""
    visitor = _Variances()
    layers = [unit.output for unit in units]
    work = dense_pass(model, blocks, chunks, layers, visitor, device, progress, "variances")
    return visitor.found, work


def _heads(prefix: str, index: int, block: nn.Module) -> UnitGroup:
    name, attention = _child(block, ATTENTIONS)
    if attention is None:
        raise _refused(prefix, block, "has no attention module of a usual name")
    parts = [getattr(attention, n, None) for n in ("q_proj", "k_proj", "v_proj")]
    last, output = _child(attention, OUTPUTS)
    linear = [p for p in [*parts, output] if type(p) is nn.Linear]
    head = getattr(attention, "head_dim", None)
    if len(linear) != 4 or not isinstance(head, int):
        raise _refused(f"{prefix}.{name}", attention, "is not made of q, k, v and o projections")
    q, k, v, o = linear
    kv = k.out_features // head
    even = kv and k.out_features == v.out_features == kv * head and not o.in_features % (kv * head)
    if not even or q.out_features != o.in_features:
        raise _refused(f"{prefix}.{name}", attention, "has heads of different sizes")
    width = o.in_features // kv
    layer = TargetLayer(f"{prefix}.{name}.{last}", o, "weight", index)
    return UnitGroup(f"{prefix}.{name}", True, layer, (q, k, v), (width, head, head), width)


def _neurons(prefix: str, index: int, block: nn.Module) -> UnitGroup:
    owner = getattr(block, "mlp", None)
    inside = isinstance(owner, nn.Module)
    name = f"{prefix}.mlp" if inside else prefix
    owner = owner if inside else block
    for names in MLPS:
        parts = [getattr(owner, n, None) for n in names]
        linear = [p for p in parts if type(p) is nn.Linear]
        if len(linear) == len(names):
            break
    else:
        raise _refused(name, owner, "is not made of separate up and down projections")
    *sources, down = linear
    if any(s.out_features != down.in_features for s in sources):
        raise _refused(name, owner, "has neurons that do not match")
    layer = TargetLayer(f"{name}.{names[-1]}", down, "weight", index)
    name = name if inside else f"{prefix}.{'+'.join(names)}"
    return UnitGroup(name, False, layer, tuple(sources), (1,) * len(sources), 1)


def _child(module: nn.Module, names: Sequence[str]) -> tuple[str, nn.Module | None]:
    for name in names:
        if isinstance(getattr(module, name, None), nn.Module):
            return name, getattr(module, name)
    return "", None


def _has_matrix(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters(recurse=False))


def _refused(name: str, module: nn.Module, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "model", f"{name} ({type(module).__name__}) {why}", SPLIT, "use another method"
    )
