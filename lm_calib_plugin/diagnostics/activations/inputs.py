"""What the inputs of a model are, and whose Gram matrices are kept at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lm_calib_plugin import engine

# Names of projections that end an attention or a feed-forward part: what they read is no hidden
# state, even where it is as wide as one.
_ENDS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "down_proj", "fc2", "dense_4h_to_h")


@dataclass(frozen=True)
class Input:
    """One distinct input tensor of a block, and the layers that read it.

    ``name`` is that of all of them, such as ``model.layers.0.mlp.gate_proj+up_proj``; ``kind`` its
    tail. ``hidden`` tells whether its channels are those of the residual stream. ``expert`` is the
    number of an expert of a fused mixture, None elsewhere.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    block: int
    width: int
    hidden: bool
    expert: int | None = None

    @property
    def module(self) -> str:
        """For an expert: its name."""
        return self.layers[0].rpartition(".")[0]

    @classmethod
    def of(cls, group: Sequence[engine.TargetLayer], hidden_size: int) -> Input:
        """Describe the input of a group of layers."""
        first, tails = group[0].name, [layer.name.rpartition(".")[2] for layer in group]
        parents = [layer.name.rpartition(".")[0] for layer in group]
        # Parts of one module are named by their tails; others by what they do not share.
        rest = [
            t if p == parents[0] else x.name for t, p, x in zip(tails, parents, group, strict=True)
        ]
        width = group[0].shape[1]
        hidden = width == hidden_size and not any(tail in _ENDS for tail in tails)
        return cls(
            "+".join([first, *rest[1:]]),
            "+".join(tails),
            tuple(layer.name for layer in group),
            group[0].block,
            width,
            hidden,
            group[0].expert,
        )


@dataclass
class Grams:
    """Which Gram matrices are kept at once, within bytes of memory; decided as blocks come.

    The first pass over the first set decides; blocks that have no room wait for another pass.
    A block that would take more than everything alone keeps those of its inputs that fit.

    Parameters
    ----------
    limit
        Most bytes of all Gram matrices together; 0: none are kept.
    sets
        How many sets are looked at: each takes two matrices an input.
    """

    limit: int
    sets: int
    taken: dict[int, set[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    used: int = 0
    full: bool = False

    def of_block(self, index: int, inputs: Sequence[Input]) -> set[str]:
        """Return the inputs of a block whose matrices are kept in this pass."""
        if not self.limit or index in self.done:
            return set()
        if index in self.taken or self.full:
            return self.taken.get(index, set())
        sizes = {one.name: 8 * one.width**2 * self.sets for one in inputs}
        if self.used + sum(sizes.values()) > self.limit and self.taken:
            self.full = True
            return set()
        kept: set[str] = set()
        for name, size in sizes.items():
            if self.used + size <= self.limit:
                kept.add(name)
                self.used += size
            else:
                self.left_out.append(name)
        self.taken[index] = kept
        return kept

    def next_pass(self) -> None:
        """Begin again with what is left."""
        self.done |= set(self.taken)
        self.taken, self.used, self.full = {}, 0, False
