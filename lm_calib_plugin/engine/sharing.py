"""What was watched of dense models, shared between the compressions of one process.

Inside :func:`shared_statistics`, compressions with other methods or other levels that look at the
same inputs of the same dense model cost one pass over the calibration set together. Nothing else
changes: weights and reports are those of runs without sharing, bit by bit, apart from seconds.

**Shared** are runs with ``propagate=dense``. There every layer is watched in the dense model, so
that what is seen depends on the model, the calibration set, its held-out part and chunks, and on
nothing that the method does. All of that is in the name under which it is kept, with what decides
last bits of sums: hardware, threads, the kind of statistic, and which layers are watched.
Inputs that are rounded token by token (``act_dynamic``) do not matter either: they are rounded
from when a block is done, behind everything that is watched of it, and the next block gets the
outputs from before.

The pass in which an allocation such as ``owl`` looks at the dense model is shared, too, whatever
the run does afterwards. So are calibration sets (:mod:`lm_calib_plugin.bank.once`).

**Not shared** are runs

- with ``propagate=compressed`` (and so all that corrects errors of earlier blocks) or
  ``true_sequential``: what a layer sees depends on how the layers before it were compressed;
- with a transform: it changes model or inputs, which is what would be watched;
- with static ranges of inputs, or with rounding of whole blocks: both run blocks again, which takes
  the hidden states, and these are not kept;
- whose chunks were halved when memory was short: their sums have other last bits;
- of structural methods and ``bits=auto``, which look at the model in ways of their own.

What a caller's own forward hooks change is not known here, as little as to the key of a recipe.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lm_calib_plugin.engine.layers import HEAD, TargetLayer
from lm_calib_plugin.engine.watched import HOST, Watched, bytes_of, copied
from lm_calib_plugin.values import whole

if TYPE_CHECKING:
    from lm_calib_plugin.engine.plan import Plan

_CGROUP = Path("/sys/fs/cgroup")


class Shared:
    """Values under names, in the memory of the host; those not used for longest make room.

    Parameters
    ----------
    limit_bytes
        Most bytes of all values; None: half of what is free, counting what is held here.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit = limit_bytes
        self._held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.hits = 0
        # Bytes of values that were not kept, by name: what they need is known the next time.
        self.refused: dict[Hashable, int] = {}

    @property
    def bytes(self) -> int:
        """Bytes of all values together."""
        return sum(size for _, size in self._held.values())

    @property
    def allowed(self) -> int:
        """Most bytes of all values, as things stand."""
        if self._limit is not None:
            return self._limit
        return (free_memory() + self.bytes) // 2

    def recall(self, name: Hashable) -> Any:
        """Return what is held under a name, or None; it counts as used."""
        found = self._held.get(name)
        if found is None:
            return None
        self.hits += 1
        self._held.move_to_end(name)
        return found[0]

    def make_room(self, size: int, allowed: int) -> None:
        """Let go of what was not used for longest until ``size`` more bytes are ``allowed``."""
        while self._held and self.bytes + size > allowed:
            self._held.popitem(last=False)

    def keep(self, name: Hashable, value: Any, size: int, allowed: int | None = None) -> None:
        """Hold a value of so many bytes, if that is ``allowed`` (None: as things stand)."""
        allowed = self.allowed if allowed is None else allowed
        if size <= allowed:
            self._held.pop(name, None)
            self.make_room(size, allowed)
            self._held[name] = value, size

    def clear(self) -> None:
        """Let go of everything."""
        self._held.clear()
        self.refused.clear()


_ACTIVE: ContextVar[Shared | None] = ContextVar("lm_calib_plugin_shared", default=None)


@contextlib.contextmanager
def shared_statistics(limit_bytes: int | None = None) -> Iterator[Shared]:
    """Share calibration sets and statistics of dense models between compressions in this context.

    Holds for this thread, until the context is left; one inside another starts empty. Weights and
    reports are those of runs without it, apart from seconds. Runs with ``propagate=dense`` share,
    as far as nothing that they do changes what is watched:
    :mod:`lm_calib_plugin.engine.sharing` says which, and why others do not.

    Parameters
    ----------
    limit_bytes
        Most bytes of memory for what is kept; what was not used for longest is dropped first.
        Default: half of the memory that is free when statistics are watched. Statistics that
        exceed it alone are not kept, and the report of such a run says so.

    Yields
    ------
    Shared
        Its ``bytes`` and ``hits`` tell what sharing costs and brings.

    Raises
    ------
    UserError
        For a limit that is no positive whole number.
    """
    limit = None if limit_bytes is None else whole("limit_bytes", limit_bytes, lowest=1)
    shared = Shared(limit)
    token = _ACTIVE.set(shared)
    try:
        yield shared
    finally:
        _ACTIVE.reset(token)
        shared.clear()


def shared_here() -> Shared | None:
    """Return what is shared here, None outside of :func:`shared_statistics`."""
    return _ACTIVE.get()


def is_shareable(plan: Plan) -> bool:
    """Tell whether what the layers of a plan see depends on nothing that its methods do."""
    methods = (plan.method, *plan.methods.values())
    rounds = plan.method.activations
    return (
        plan.inputs is not None
        and plan.propagate == "dense"
        and not plan.true_sequential
        and (rounds is None or rounds.dynamic)
        and all(m.transform is None and m.block_rounding is None for m in methods)
    )


def run_statistics(model: nn.Module, plan: Plan) -> RunStatistics | None:
    """Return the statistics of a run that shares them; None for one that does not."""
    shared = shared_here()
    if shared is None or not is_shareable(plan):
        return None
    layers = tuple((layer.name, layer.shape) for layer in plan.layers)
    # The class itself, beside its name in `inputs`: another one of that name is another class.
    name = ("inputs", plan.inputs, type(model), plan.statistic, plan.uses_heldout, layers)
    return RunStatistics(shared, name, len({x.block for x in plan.layers if x.block != HEAD}))


@dataclass(frozen=True)
class _Block:
    """Names of layers that share an input, with what was watched of it; tokens borrowed."""

    inputs: Sequence[tuple[Sequence[str], Watched]]
    borrowed: Mapping[str, int]


class RunStatistics:
    """What is watched in one run: known from an earlier one, or on its way to be kept.

    Nothing is kept before a run is through, so that one that fails leaves nothing behind.

    Parameters
    ----------
    shared, name
        Where statistics are kept, and their name there.
    count
        How many blocks are watched.
    """

    def __init__(self, shared: Shared, name: Hashable, count: int) -> None:
        self._shared, self._name, self._count = shared, name, count
        self._known: Mapping[int, _Block] | None = shared.recall(name)
        self._allowed = shared.allowed
        self._size = 0
        self._fits = True
        self._blocks: dict[int, _Block] = {}

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
        numbers = {layer.name: layer for layer in layers}
        found: dict[int, Watched] = {}
        for names, seen in self._known[index].inputs:
            own = copied(seen, numbers[names[0]].device)
            found |= {id(numbers[name]): own for name in names}
        return found, self._known[index].borrowed

    def add(
        self,
        index: int,
        groups: Sequence[Sequence[TargetLayer]],
        watched: Sequence[Watched],
        borrowed: Mapping[str, int],
    ) -> None:
        """Note what was watched of one block: a copy, taken before any method sees it."""
        if not self._size:
            # Blocks are mostly alike: what can not fit in the end drives nothing else out.
            likely = self._count * sum(bytes_of(seen) for seen in watched)
            self._fits = self._shared.refused.get(self._name, likely) <= self._allowed
        self._size += sum(bytes_of(seen) for seen in watched)
        if not self._fits or self._size > self._allowed:
            self._let_go()
            return
        self._shared.make_room(self._size, self._allowed)
        self._blocks[index] = _Block(
            [
                ([layer.name for layer in group], copied(seen, HOST))
                for group, seen in zip(groups, watched, strict=True)
            ],
            dict(borrowed),
        )

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
            self._shared.keep(self._name, self._blocks, self._size, self._allowed)
            return []
        self._shared.refused[self._name] = self._size
        if self._size <= self._allowed:  # the first block was the largest: it is kept next time
            return []
        return [
            f"statistics are not shared with other runs: they need {_gib(self._size)}, "
            f"{_gib(self._allowed)} are allowed; raise limit_bytes, or take fewer layers"
        ]

    def _let_go(self) -> None:
        self._fits = False
        self._blocks.clear()


def free_memory() -> int:
    """Return how many bytes of memory this process may still take."""
    try:
        import psutil
    except ImportError:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free = int(psutil.virtual_memory().available)
    # A container may have less than its machine.
    with contextlib.suppress(OSError, ValueError):
        most, taken = (int((_CGROUP / f"memory.{x}").read_text()) for x in ("max", "current"))
        rows = (_CGROUP / "memory.stat").read_text().splitlines()
        # Files that are only held in case they are read again make way.
        cached = sum(int(row.split()[1]) for row in rows if row.startswith("inactive_file "))
        free = min(free, max(0, most - taken + cached))
    return free


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
