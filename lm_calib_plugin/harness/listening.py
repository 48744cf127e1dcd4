"""What stands in for objects of the harness to learn what it tells nobody else."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lm_calib_plugin.diagnostics.tokens import TokenDivergence
from lm_calib_plugin.harness.divergence_sums import Request

# What our own entries of a response cache begin with.
_OURS = "lm_calib_plugin."


class Noted:
    """A cache hook that is told which request each generated row answers, and passes it on."""

    def __init__(self, hook: Any, named: Sequence[Request], requests: Sequence[Any]) -> None:
        self.hook = hook
        self.found: list[TokenDivergence | None] = []
        self._asked: list[tuple[str, Any]] = []
        self._owners: dict[str, list[tuple[Any, Request]]] = defaultdict(list)
        times: Counter[int] = Counter()
        for request, asked in zip(named, requests, strict=True):
            times[id(asked)] += 1
            # More often than it asks for itself, it fills up a process that has fewer requests.
            if times[id(asked)] <= (getattr(asked, "repeats", None) or 1):
                self._owners[asked.args[0]].append((asked.args[1], request))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hook, name)

    def add_partial(self, attribute: str, request: Any, answer: Any) -> None:
        """Pass an answer on; rows are answered in the order in which they were generated."""
        self._asked.append((request[0], request[1]))
        self.hook.add_partial(attribute, request, answer)

    def matched(self) -> Iterator[tuple[Request, TokenDivergence | None]]:
        """Yield each request with what was found along its answer."""
        for (context, options), found in zip(self._asked, self.found, strict=False):
            waiting = self._owners[context]
            place = next((i for i, (own, _) in enumerate(waiting) if own == options), None)
            if place is not None:
                yield waiting.pop(place)[1], found


def counted_reads(database: Any) -> Counter[str] | None:
    """Count what is read from a response cache from now on; None where it can not be counted.

    The harness reads an answer once, when it gives it. Nothing else tells us about it.
    """
    reads: Counter[str] = Counter()
    kind = type(database)

    def read(self: Any, name: Any) -> Any:
        value = kind.__getitem__(self, name)
        if not str(name).startswith(_OURS):
            reads["answers"] += 1
        return value

    try:
        database.__class__ = type(kind.__name__, (kind,), {"__getitem__": read})
    except TypeError:
        return None
    return reads
