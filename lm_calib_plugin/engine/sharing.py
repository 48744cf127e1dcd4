"""What was watched of dense models, shared between the compressions of one process.

Inside :func:`shared_statistics`, compressions with other methods or other levels that look at the
same inputs of the same dense model cost one pass over the calibration set together. Nothing else
changes: weights and reports are those of runs without sharing, bit by bit, apart from seconds.

**Shared** are runs with ``propagate=dense``. There every layer is watched in the dense model, so
that what is seen depends on the model, the calibration set, its held-out part and chunks, and on
nothing that the method does. All of that is in the name under which it is kept, with what decides
last bits of sums: hardware and threads. A run takes what it needs of what was watched: the kinds of
statistics that its methods use, of its layers. So those of more kinds, of more layers, and with the
sequences held out serve runs that need less; only of the experts of a block a run has to treat all
or none, as those that saw few tokens borrow from the others.

A pass watches what its own run needs, and beside it the ``kinds`` that are declared: then one pass
serves methods that need second moments and methods that need Gram matrices. Each kind is summed for
itself, as it is alone (moments that were read off a Gram matrix would have other last bits).
Inputs that are rounded token by token (``act_dynamic``) do not matter either: they are rounded
from when a block is done, behind everything that is watched of it, and the next block gets the
outputs from before.

Equal Gram matrices are factored once, on the CPU, and outputs of dense layers on the samples that
errors are measured on are computed once.

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
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.statistics import Component, components, known_kinds
from lm_calib_plugin.values import whole

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
        # What saves less than it takes room; it goes first.
        self._spare: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.hits = 0
        # What passes watch for runs to come.
        self.expected: frozenset[Component] = frozenset()
        # Bytes of values that were not kept, by name: what they need is known the next time.
        self.refused: dict[Hashable, int] = {}

    def expect(self, kinds: Iterable[str]) -> None:
        """Let passes from now on watch these kinds of statistics, too.

        Raises
        ------
        UserError
            For a kind that there is not.
        """
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        unknown = [kind for kind in kinds if kind not in known_kinds()]
        if unknown:
            raise UserError("kinds", f"got {unknown[0]!r}", f"allowed: {listed(known_kinds())}")
        self.expected = frozenset(part for kind in kinds for part in components(kind))

    @property
    def bytes(self) -> int:
        """Bytes of all values together."""
        return sum(size for held in (self._held, self._spare) for _, size in held.values())

    @property
    def allowed(self) -> int:
        """Most bytes of all values, as things stand."""
        if self._limit is not None:
            return self._limit
        return (free_memory() + self.bytes) // 2

    @property
    def names(self) -> list[Hashable]:
        """Names of all values, those used last at the end."""
        return list(self._held)

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
        for held in (self._spare, self._held):
            while held and self.bytes + size > allowed:
                held.popitem(last=False)

    def keep(self, name: Hashable, value: Any, size: int, allowed: int | None = None) -> None:
        """Hold a value of so many bytes, if that is ``allowed`` (None: as things stand)."""
        allowed = self.allowed if allowed is None else allowed
        if size <= allowed:
            self._held.pop(name, None)
            self.make_room(size, allowed)
            self._held[name] = value, size

    def recall_spare(self, name: Hashable) -> Any:
        """Return what is held as long as there is room, or None."""
        found = self._spare.get(name)
        return None if found is None else found[0]

    def keep_spare(self, name: Hashable, make: Callable[[], Any], size: int, allowed: int) -> None:
        """Hold what ``make`` returns as long as there is room; it takes that of nothing else."""
        if self.bytes + size <= allowed:
            self._spare[name] = make(), size

    def clear(self) -> None:
        """Let go of everything."""
        self._spare.clear()
        self._held.clear()
        self.refused.clear()


_ACTIVE: ContextVar[Shared | None] = ContextVar("lm_calib_plugin_shared", default=None)


@contextlib.contextmanager
def shared_statistics(
    limit_bytes: int | None = None, kinds: Iterable[str] = ()
) -> Iterator[Shared]:
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
        exceed it alone are not kept, and the report of such a run says so. Of several kinds, those
        are kept that fit, the smallest first.
    kinds
        What the runs to come need to know of the inputs, so that the first pass watches all of it:
        ``moments`` (wanda, ria), ``gram`` (sparsegpt, gptq, alps, swap_pcg), ``spread``
        (dsnot), ``ranges``, joined as in ``gram+spread``, and with ``+heldout`` for
        methods that stop or choose by the sequences held out. Default: each pass watches what its
        own run needs.

    Yields
    ------
    Shared
        Its ``bytes`` and ``hits`` tell what sharing costs and brings; ``expect`` declares other
        kinds from then on.

    Raises
    ------
    UserError
        For a limit that is no positive whole number, and for kinds that there are not.
    """
    limit = None if limit_bytes is None else whole("limit_bytes", limit_bytes, lowest=1)
    shared = Shared(limit)
    shared.expect(kinds)
    try:
        with share_in(shared):
            yield shared
    finally:
        shared.clear()


@contextlib.contextmanager
def share_in(shared: Shared) -> Iterator[None]:
    """Let compressions in this context share what lies in ``shared``, which is kept behind it."""
    token = _ACTIVE.set(shared)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def shared_here() -> Shared | None:
    """Return what is shared here, None outside of :func:`shared_statistics`."""
    return _ACTIVE.get()


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
