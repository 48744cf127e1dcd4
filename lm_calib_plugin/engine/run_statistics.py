"""What one run watches, or takes from runs before it; see :mod:`lm_calib_plugin.engine.sharing`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from lm_calib_plugin.engine.layers import HEAD, TargetLayer
from lm_calib_plugin.engine.plan import Plan
from lm_calib_plugin.engine.sharing import Shared, shared_here
from lm_calib_plugin.engine.watched import HOST, Energies, Watched, bytes_of, copied
from lm_calib_plugin.method import Method
from lm_calib_plugin.statistics import (
    Component,
    InverseFactor,
    LayerStats,
    TokenSample,
    components,
    listed_components,
    put_together,
    taken_apart,
)

# Name, shape and block of a layer, and whether it is one of several experts.
Layout: TypeAlias = tuple[tuple[str, tuple[int, int], int, bool], ...]


def can_share(method: Method) -> bool:
    """Tell whether what layers see of the dense model depends on nothing that a method does."""
    rounds = method.activations
    return (
        (rounds is None or rounds.dynamic)
        and method.transform is None
        and method.block_rounding is None
    )


def kind_of(method: Method) -> str | None:
    """Return what ``shared_statistics(kinds=...)`` calls what a method needs to know of the inputs.

    None for a method that does not share, such as one that changes the model first.
    """
    if method.scope == "model" or not can_share(method):
        return None
    return method.statistic + "+heldout" * (method.uses_heldout and method.statistic != "none")


def is_shareable(plan: Plan) -> bool:
    """Tell whether what the layers of a plan see depends on nothing that its methods do."""
    return (
        plan.inputs is not None
        and plan.propagate == "dense"
        and not plan.true_sequential
        and all(can_share(method) for method in (plan.method, *plan.methods.values()))
    )


def run_statistics(model: nn.Module, plan: Plan) -> RunStatistics | None:
    """Return the statistics of a run that shares them; None for one that does not."""
    shared = shared_here()
    if shared is None or not is_shareable(plan):
        return None
    # The class itself, beside its name in `inputs`: another one of that name is another class.
    return RunStatistics(shared, ("inputs", plan.inputs, type(model)), plan)


@dataclass(frozen=True)
class _Name:
    """The name of a pass: model and data, the layers that were watched, and what of them."""

    source: Hashable
    layout: Layout
    parts: frozenset[Component]

    def serves(self, source: Hashable, layout: Layout, parts: frozenset[Component]) -> bool:
        """Tell whether the pass watched all that a run needs, to the last bit."""
        if self.source != source or not parts <= self.parts:
            return False
        known = set(self.layout)
        if not all(one in known for one in layout):
            return False
        # Experts borrow from all of their block that are watched.
        return not parts or all(
            _experts(layout, block) == _experts(self.layout, block)
            for block in {block for _, _, block, expert in layout if expert}
        )


@dataclass(frozen=True)
class _Input:
    """What was watched of one input of some layers."""

    names: Sequence[str]
    used: TokenSample
    heldout: TokenSample
    parts: dict[Component, LayerStats]
    energies: Energies


@dataclass
class _Pass:
    """What was watched of the inputs of each block, and how many tokens experts borrowed."""

    blocks: dict[int, list[_Input]] = field(default_factory=dict)
    borrowed: dict[int, Mapping[str, int]] = field(default_factory=dict)


class RunStatistics:
    """What is watched in one run: known from an earlier one, or on its way to be kept.

    Nothing is kept before a run is through, so that one that fails leaves nothing behind.

    Parameters
    ----------
    shared
        Where statistics are kept.
    source
        Name of the dense model and of what goes through it.
    plan
        The run.
    """

    def __init__(self, shared: Shared, source: Hashable, plan: Plan) -> None:
        self._shared, self._source = shared, source
        self._kind, self._with_heldout = plan.statistic, plan.uses_heldout
        self._own = components(self._kind, self._with_heldout)
        self._layout = layout_of(plan.layers)
        self._count = len({x.block for x in plan.layers if x.block != HEAD})
        name = self._find(self._own)
        self._known: _Pass | None = None if name is None else shared.recall(name)
        expected = frozenset[Component]() if self.known else shared.expected - self._own
        # What is watched for others, as far as it is not known yet.
        self.others = frozenset(x for x in expected if self._find(frozenset([x])) is None)
        self._allowed = shared.allowed
        self.factors = SharedFactors(shared, lambda: self._allowed - self._size)
        self._pass = _Pass()
        # Parts to be kept; bytes of those and of others, and of the samples of rows.
        self._kept = self._own | self.others
        self._sizes: dict[Component, int] = dict.fromkeys(self._kept, 0)
        self._samples = 0
        self._fits = True

    @property
    def known(self) -> bool:
        """Whether nothing has to be watched."""
        return self._known is not None

    def of_block(
        self, index: int, layers: Sequence[TargetLayer]
    ) -> tuple[dict[int, Watched], Mapping[str, int]]:
        """Return what is known of the layers of one block.

        Returns
        -------
        watched
            By ``id(layer)``, on the device of the layers; copies, which the caller may change.
        borrowed
            Number of tokens borrowed, by name of the layer.
        """
        assert self._known is not None
        wanted = {layer.name: layer for layer in layers}
        found: dict[int, Watched] = {}
        for seen in self._known.blocks[index]:
            names = [name for name in seen.names if name in wanted]
            if names:
                device = wanted[names[0]].device
                parts = {part: copied(seen.parts[part], device) for part in self._own}
                stats = put_together(self._kind, self._with_heldout, parts)
                samples = copied(seen.used, device), copied(seen.heldout, device)
                own = Watched(stats, *samples, energies=seen.energies)
                found |= {id(wanted[name]): own for name in names}
        borrowed = self._known.borrowed[index] if self._own else {}
        return found, {name: n for name, n in borrowed.items() if name in wanted}

    def add(
        self,
        index: int,
        groups: Sequence[Sequence[TargetLayer]],
        watched: Sequence[Watched],
        borrowed: Mapping[str, int],
    ) -> None:
        """Note what was watched of one block: a copy, taken before any method sees it."""
        inputs = []
        for group, seen in zip(groups, watched, strict=True):
            parts = taken_apart(self._kind, seen.stats) | seen.others
            names = [layer.name for layer in group]
            samples = seen.used, seen.heldout
            inputs.append(_Input(names, *samples, parts, Energies(*samples)))
        broken = {p for seen in inputs for p, one in seen.parts.items() if not one.is_finite()}
        # Sums that overflow are an error of runs that need them, and of no other.
        self._give_up(broken)
        first = not self._samples
        self._samples += sum(bytes_of([seen.used, seen.heldout]) for seen in inputs)
        for part in self._sizes:
            self._sizes[part] += sum(bytes_of(seen.parts.get(part)) for seen in inputs)
        # Blocks are mostly alike: what can not fit in the end drives nothing else out.
        self._drop_what_does_not_fit(self._count if first else 1)
        if self._fits:
            self._shared.make_room(self._size, self._allowed)
            kept = self._pass.blocks[index] = [self._copy_of(seen) for seen in inputs]
            for one, copy in zip(watched, kept, strict=True):
                one.energies = copy.energies
            self._pass.borrowed[index] = dict(borrowed)
        for one in watched:
            one.others.clear()

    def give_up_others(self) -> bool:
        """Watch only what this run needs from now on; return whether that is less than before."""
        given_up = bool(self.others)
        self._give_up(self.others)
        return given_up

    def finish(self, halved: bool) -> list[str]:
        """Keep what was watched, now that the run is through.

        Parameters
        ----------
        halved
            Whether chunks were halved on the way: sums have other last bits then.

        Returns
        -------
        list of str
            What a report says of statistics that do not fit.
        """
        if self.known:
            return []
        if halved:
            self._let_go()
            return []
        if self._fits:
            name = _Name(self._source, self._layout, self._kept)
            self._shared.keep(name, self._pass, self._size, self._allowed)
        lost = self._own - self._kept if self._fits else self._own
        if self._fits and not lost:
            return []
        for part in lost:
            self._shared.refused[self._name_of_size(part)] = self._sizes[part]
        self._shared.refused[self._name_of_size(None)] = self._samples
        needed = self._samples + sum(self._sizes[part] for part in lost)
        if needed <= self._allowed:  # the first block was the largest: it is kept next time
            return []
        kind = f" ({listed_components(lost)})" if self._fits else ""
        return [
            f"statistics{kind} are not shared with other runs: they need {_gib(needed)}, "
            f"{_gib(self._allowed)} are allowed; raise limit_bytes, or take fewer layers"
        ]

    # --- what fits ------------------------------------------------------------------------

    @property
    def _size(self) -> int:
        """Bytes of what is to be kept so far."""
        if self.known or not self._fits:
            return 0
        return self._samples + sum(self._sizes[part] for part in self._kept)

    def _likely(self, part: Component | None, times: int) -> int:
        """Return how many bytes a part (None: the samples) will need after ``times`` as much."""
        now = self._samples if part is None else self._sizes[part]
        known = self._shared.refused.get(self._name_of_size(part))
        return now if times == 1 else times * now if known is None else known

    def _drop_what_does_not_fit(self, times: int) -> None:
        """Give up the largest parts until what is left fits, ``times`` as large as it is."""
        likely = {part: self._likely(part, times) for part in self._kept}
        samples = self._likely(None, times)
        while self._fits and samples + sum(likely[part] for part in self._kept) > self._allowed:
            # Samples alone are what a run without statistics watches.
            if len(self._kept) == (1 if self._own else 0):
                self._let_go()
            else:
                self._give_up({max(self._kept, key=lambda part: (likely[part], part))})

    def _give_up(self, parts: Iterable[Component]) -> None:
        """Neither keep nor go on watching parts, as far as this run does not need them itself."""
        gone = frozenset(parts)
        self.others -= gone
        self._kept -= gone
        for inputs in self._pass.blocks.values():
            for seen in inputs:
                for part in gone:
                    seen.parts.pop(part, None)

    def _let_go(self) -> None:
        self._fits = False
        self.others = frozenset()
        self._pass = _Pass()

    def _copy_of(self, seen: _Input) -> _Input:
        parts = {part: copied(seen.parts[part], HOST) for part in self._kept}
        samples = copied(seen.used, HOST), copied(seen.heldout, HOST)
        return _Input(seen.names, *samples, parts, Energies(*samples))

    def _find(self, parts: frozenset[Component]) -> _Name | None:
        """Return the name of a pass that watched these parts of all layers of this run."""
        for name in self._shared.names:
            if isinstance(name, _Name) and name.serves(self._source, self._layout, parts):
                return name
        return None

    def _name_of_size(self, part: Component | None) -> Hashable:
        return "size", self._source, self._layout, part


class SharedFactors:
    """Factors of Gram matrices among what is shared, as long as statistics need no room.

    Parameters
    ----------
    shared
        Where they are kept.
    allowed
        Returns most bytes of all that is kept there.
    """

    def __init__(self, shared: Shared, allowed: Callable[[], int]) -> None:
        self._shared, self._allowed = shared, allowed

    def recall(self, name: Hashable) -> InverseFactor | None:
        """Return a factor that is known, or None; a copy."""
        found: InverseFactor | None = self._shared.recall_spare(("factor", name))
        return None if found is None else found.copy()

    def keep(self, name: Hashable, factor: InverseFactor) -> None:
        """Keep a copy of a factor, if there is room."""
        self._shared.keep_spare(("factor", name), factor.copy, factor.nbytes, self._allowed())


def layout_of(layers: Iterable[TargetLayer]) -> Layout:
    """Return what has to be equal of layers that share statistics."""
    return tuple((x.name, x.shape, x.block, x.expert is not None) for x in layers)


def _experts(layout: Layout, block: int) -> list[str]:
    return [name for name, _, place, expert in layout if expert and place == block]


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
