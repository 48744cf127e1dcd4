"""What ``divergence=true`` adds up: by task, and by item where an item is a choice of answers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_calib_plugin.diagnostics.tally import Tally

SCORED, GENERATED = "scored", "generated"
CACHED = "answers of the response cache"
EXAMPLES = 5


@dataclass(frozen=True)
class Request:
    """A request of the harness: ``number`` among those of its document.

    ``bare``: without any context; ``chooses``: it asks for the likelihood of one answer.
    """

    task: str
    document: Any
    number: int
    bare: bool
    chooses: bool


@dataclass(frozen=True)
class Place:
    """One window of a request; all but running text have one."""

    request: Request
    window: int = 0


class Sums:
    """Sums of one process, or of all.

    ``left`` counts what was not compared, by reason; ``cached`` answers of the response cache
    (None: nobody counts them); ``seconds`` what the comparison took.
    """

    def __init__(self) -> None:
        self.left: Counter[str] = Counter()
        self.cached: Counter[str] | None = Counter()
        self.seconds = 0.0
        self._tallies: dict[tuple[str, str], Tally] = {}
        # By task and document: log-likelihoods (dense, compressed) of each answer.
        self._choices: dict[str, dict[Any, dict[int, tuple[float, float, bool]]]] = defaultdict(
            dict
        )

    def tally(self, task: str, kind: str) -> Tally:
        """Return the tally of a task, for what was scored or what was generated."""
        return self._tallies.setdefault((task, kind), Tally())

    def answered(self, request: Request, dense: float, compressed: float) -> None:
        """Take the log-likelihoods of a request, or of a window of it."""
        self.tally(request.task, SCORED).requests.add((request.document, request.number))
        if request.chooses:
            own = self._choices[request.task].setdefault(request.document, {})
            own[request.number] = (dense, compressed, request.bare)

    def unanswered(self, request: Request) -> None:
        """Take it that a request has no log-likelihood: no choice can be told of its item."""
        if request.chooses:
            own = self._choices[request.task].setdefault(request.document, {})
            own[request.number] = (math.nan, math.nan, request.bare)

    def plain(self) -> dict[str, Any]:
        """Return plain values for another process."""
        tallies = {
            key: (tally.documents, tally.js.tobytes(), tally.requests)
            for key, tally in self._tallies.items()
        }
        return {
            "left": dict(self.left),
            "cached": None if self.cached is None else dict(self.cached),
            "seconds": self.seconds,
            "tallies": tallies,
            "choices": dict(self._choices),
        }

    def merge(self, plain: Mapping[str, Any]) -> None:
        """Add what a process has found; seconds are those of the slowest."""
        self.left.update(plain["left"])
        if self.cached is None or plain["cached"] is None:
            self.cached = None
        else:
            self.cached.update(plain["cached"])
        self.seconds = max(self.seconds, plain["seconds"])
        for key, (documents, values, requests) in plain["tallies"].items():
            other = Tally(documents, requests=requests)
            other.js.frombytes(values)
            self.tally(*key).merge(other)
        for task, items in plain["choices"].items():
            self._choices[task].update(items)

    def report(self) -> dict[str, Any]:
        """Return tasks, what was not compared, and the seconds it took."""
        tasks: dict[str, Any] = {}
        for (task, kind), tally in sorted(self._tallies.items()):
            tasks.setdefault(task, {})[kind] = tally.row()
        for task, items in sorted(self._choices.items()):
            found = _answers(items)
            if found is not None:
                # An item may lack answers that the cache gave.
                tasks.setdefault(task, {})["answers"] = CACHED if self._from_cache() else found
        return {
            "tasks": tasks,
            "not_compared": self._not_compared(),
            "seconds": round(self.seconds, 3),
        }

    def warnings(self) -> list[str]:
        """Return a sentence for each kind of thing that was not compared."""
        return [
            f"divergence: not compared: {'some' if count is None else count} {reason}"
            for reason, count in self._not_compared().items()
        ]

    def _from_cache(self) -> bool:
        return self.cached is None or bool(self.cached.total())

    def _not_compared(self) -> dict[str, int | None]:
        found: dict[str, int | None] = dict(sorted(self.left.items()))
        if self._from_cache():
            found[CACHED] = None if self.cached is None else self.cached.total()
        return found


def _answers(items: Mapping[Any, Mapping[int, tuple[float, float, bool]]]) -> Any:
    """Compare which answer each model likes best, over items with two answers or more.

    By the sums of log-likelihoods, as the metric ``acc`` of the harness does. Where answers are
    asked for with and without their question, those without are another metric's.
    """
    changed, sure = [], []
    for item, answers in items.items():
        rows = [answers[number] for number in sorted(answers)]
        if not all(bare for _, _, bare in rows):
            rows = [row for row in rows if not row[2]]
        if len(rows) < 2 or any(math.isnan(row[0]) for row in rows):
            continue
        both = [[row[model] for row in rows] for model in (0, 1)]
        best = [max(range(len(own)), key=own.__getitem__) for own in both]
        if best[0] != best[1]:
            changed.append(item)
        sure.append([_confidence(own) for own in both])
    if not sure:
        return None
    dense, compressed = (math.fsum(own) / len(own) for own in zip(*sure, strict=True))
    first = sorted(changed, key=lambda item: (type(item).__name__, item))[:EXAMPLES]
    return {
        "items": len(sure),
        "changed": len(changed),
        "share": len(changed) / len(sure),
        "confidence": {"dense": dense, "compressed": compressed},
        "examples": first,
    }


def _confidence(likelihoods: Sequence[float]) -> float:
    """Return the probability of the best answer among these."""
    best = max(likelihoods)
    return 1 / math.fsum(math.exp(value - best) for value in likelihoods)
