"""Processes that do one compression together: what they tell each other, and how they fail.

Every process of torch's process group holds the whole model. Chunks are dealt out, statistics are
added up at the process that solves a layer, and its result goes to all: they end with the same
bits, whatever they compute on.

All that is said between processes begins with :meth:`Ranks.exchange`, which every process calls in
the same order. A process that fails calls it once more, with its error: the others get it where
they are, and end, too. So nothing may wait for another process in any other way.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.guard import several_processes

log = logging.getLogger(__name__)

# For how long processes wait until all have come, and then for each other's work.
ARRIVE, WORK = timedelta(minutes=20), timedelta(hours=24)
# Small tensors travel together, up to this many bytes.
BUNDLE = 1 << 24
# Groups of our own on the host, for the process group that was there when they were made.
_groups: list[tuple[Any, Any]] = []


class RankError(CalibError):
    """Another process failed, or went away; this one was fine."""


class Ranks:
    """The processes that work together, as one of them sees them.

    Parameters
    ----------
    rank, count
        Number of this process, and how many there are.
    group
        What they talk through on the host; None for one process.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None) -> None:
        self.rank, self.count, self._group = rank, count, group
        # Nobody listens any more: all know of the failure, or a process is gone.
        self._over = False

    @classmethod
    def here(cls, together: bool = True) -> Ranks:
        """Wait for all processes of torch's process group, and return them.

        One process, where there are no others, or where each is to work for itself.

        Raises
        ------
        CalibError
            When the others do not come.
        """
        if not together or not several_processes() or distributed.get_world_size() == 1:
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size(), _host_group())

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    # --- words ---------------------------------------------------------------------------

    def exchange(self, stage: str, value: Any = None) -> list[Any]:
        """Hand a plain value to all processes; returns those of all, in their order.

        Parameters
        ----------
        stage
            Where this process is; all have to be at the same place.

        Raises
        ------
        RankError
            When another process failed, or is somewhere else.
        """
        if not self.several:
            return [value]
        said = self._gather((stage, None, value))
        for number, (_, error, _) in enumerate(said):
            if error is not None:
                self._over = True
                raise RankError(f"process {number} of {self.count} failed: {error}")
        stages = [other for other, _, _ in said]
        if len(set(stages)) > 1:
            self._over = True
            raise RankError(f"the processes went different ways: {', '.join(stages)}")
        return [found for _, _, found in said]

    def first(self, stage: str, value: Any) -> Any:
        """Return the value of the first process, to all."""
        return self.exchange(stage, value if self.rank == 0 else None)[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let the others know when this process fails inside, and wait for all at the end."""
        try:
            yield
            self.exchange("end")
        except Exception as error:
            self._tell(error)
            raise

    def _tell(self, error: Exception) -> None:
        if not self.several or self._over:
            return
        # Whoever can not be reached is gone already.
        with contextlib.suppress(RankError):
            self._gather(("", f"{type(error).__name__}: {error}", None))
        self._over = True

    def _gather(self, said: Any) -> list[Any]:
        if self._over:
            raise RankError("the work of all processes has ended after a failure")
        found: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(found, said, group=self._group)
        except RuntimeError as error:
            self._over = True
            raise self._gone(error) from error
        return found

    # --- tensors -------------------------------------------------------------------------

    def add_up(self, tensors: Sequence[Tensor], owner: int | None, largest: bool = False) -> None:
        """Add the tensors of all processes up at one, or with None at all; in place.

        Elsewhere they hold nothing of use afterwards. With ``largest``, the largest value of every
        element is taken. The sums are the same bits wherever they are.
        """
        operation = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM

        def carry(way: Tensor, group: Any) -> None:
            distributed.reduce(way, owner or 0, op=operation, group=group)
            if owner is None:
                distributed.broadcast(way, 0, group=group)

        self._carry(tensors, carry, owner in (None, self.rank))

    def spread(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Give the tensors of one process to all, bit by bit; in place."""

        def carry(way: Tensor, group: Any) -> None:
            # As bytes: not every way knows every kind of number.
            distributed.broadcast(way.view(-1).view(torch.uint8), owner, group=group)

        self._carry(tensors, carry, owner != self.rank)

    def _carry(
        self, tensors: Sequence[Tensor], carry: Callable[[Tensor, Any], None], keep: bool
    ) -> None:
        """Send tensors, small ones in bundles; with ``keep``, write what came back into them."""
        try:
            for bundle in _bundles(tensors) if self.several else ():
                self._carry_one(bundle, carry, keep)
        except BaseException as error:
            # The others wait for tensors: no word reaches them, but they see the door shut.
            self._leave()
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                raise self._gone(error) from error
            raise

    def _carry_one(
        self, bundle: Sequence[Tensor], carry: Callable[[Tensor, Any], None], keep: bool
    ) -> None:
        one = bundle[0]
        sent = one if len(bundle) == 1 else torch.cat([x.reshape(-1) for x in bundle])
        # GPUs talk to each other where they can.
        direct = one.is_cuda and "nccl" in str(distributed.get_backend())
        way = sent.contiguous() if direct else sent.cpu().contiguous()
        if direct:
            # There no door can be shut: whoever fails up to here is heard before anybody waits.
            self.exchange("tensors", None)
        carry(way, None if direct else self._group)
        if keep and way is not one:
            parts = way.view(-1).split([x.numel() for x in bundle])
            for tensor, part in zip(bundle, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _leave(self) -> None:
        """Close the connections to the other processes."""
        self._over = True
        _groups.clear()
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            distributed.destroy_process_group(self._group)
        self._group = None

    def _gone(self, error: Exception) -> RankError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return RankError(f"one of {self.count} processes went away ({lines[0][:200]})")

    # --- work ----------------------------------------------------------------------------

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Return which process does each of several pieces of work, given what they cost.

        The largest goes first, to whoever has least to do; the same on all processes.
        """
        loads, found = [0.0] * self.count, [0] * len(costs)
        for number in sorted(range(len(costs)), key=lambda i: -costs[i]):
            place = loads.index(min(loads))
            found[number] = place
            loads[place] += costs[number]
        return found


def _host_group() -> Any:
    """Return a group of our own for words and for tensors of the host; made once."""
    world = distributed.group.WORLD
    for known, group in _groups:
        if known is world:
            return group
    try:
        # Whoever makes a group waits for all others to do so.
        distributed.new_group(backend="gloo", timeout=ARRIVE)
    except RuntimeError as error:
        raise RankError(
            f"not all {distributed.get_world_size()} processes came to compress a model together "
            f"({error}). Call it on every process, or with split=false where one works "
            "for itself."
        ) from error
    group = distributed.new_group(backend="gloo", timeout=WORK)
    _groups[:] = [(world, group)]
    return group


def _bundles(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors in the order given, neighbors of one kind together up to a number of bytes."""
    bundle: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if not tensor.numel():
            continue
        alike = bundle and (tensor.dtype, tensor.device) == (bundle[0].dtype, bundle[0].device)
        if bundle and not (alike and size + tensor.nbytes <= BUNDLE):
            yield bundle
            bundle, size = [], 0
        bundle.append(tensor)
        size += tensor.nbytes
    if bundle:
        yield bundle
