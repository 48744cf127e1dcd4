"""Which evaluated items stand in the calibration text; counted while the harness evaluates."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.calibration.contamination import (
    NGRAM,
    SHORTEST,
    ContaminationIndex,
    Overlap,
    words,
)
from lm_calib_plugin.calibration.set_folder import decoded, owners
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.guard import several_processes

log = logging.getLogger(__name__)

EXAMPLES = 3
NO_TEXT, NOT_CHECKED = "no calibration text", "not checked"
ROLLING = "loglikelihood_rolling"
# Names of what a response cache remembers for us.
RESERVED, UNCHECKED = "lm_calib_plugin.leakage", "lm_calib_plugin.leakage_unchecked"
_LONGEST_SHOWN = 160


@dataclass
class _Task:
    """What was seen of one task: items, and how those touched were touched."""

    items: set[Any] = field(default_factory=set)
    touched: dict[Any, tuple[str, str, str]] = field(default_factory=dict)  # kind, source, words

    def merge(self, other: _Task) -> None:
        self.items |= other.items
        self.touched |= other.touched

    def plain(self) -> list[Any]:
        return [sorted(self.items, key=_order), {k: list(v) for k, v in self.touched.items()}]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> _Task:
        items, touched = plain
        return cls(set(items), {item: tuple(found) for item, found in touched.items()})

    def row(self) -> dict[str, Any]:
        first = sorted(self.touched, key=_order)[:EXAMPLES]
        return {
            "items": len(self.items),
            "touched": len(self.touched),
            "share": round(len(self.touched) / max(1, len(self.items)), 6),
            "by": dict(sorted(Counter(kind for kind, _, _ in self.touched.values()).items())),
            "sources": dict(sorted(Counter(name for _, name, _ in self.touched.values()).items())),
            "examples": [
                {"doc_id": item, "words": self.touched[item][2][:_LONGEST_SHOWN]} for item in first
            ],
        }


class LeakCheck:
    """Compares requests of the harness with a calibration set.

    An item is touched when its own document overlaps with the calibration text where the
    document stands in what the model is shown or scored on: few-shot examples and instructions,
    which other items share, do not touch it. Where the document is not found in the prompt (it
    was rewritten), all of the prompt counts but what most items of the task share. Of running
    text all counts.

    Parameters
    ----------
    calibration
        The set that was used; None: there is nothing to compare with.
    tokenizer
        Decodes it.
    on_leak
        ``warn``, ``error`` or ``ignore``.
    """

    def __init__(self, calibration: CalibrationSet | None, tokenizer: Any, on_leak: str) -> None:
        self.on_leak = on_leak
        self._calibration, self._tokenizer = calibration, tokenizer
        self._index: ContaminationIndex | None = None
        self._owners: list[str] = []
        self._tasks: dict[str, _Task] = {}
        self._cache: Any = None
        self._unchecked = False

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return self._calibration is not None and self.on_leak != "ignore"

    def check(self, requests: Sequence[Any]) -> None:
        """Count the items of a batch of requests.

        Raises
        ------
        UserError
            With ``on_leak=error``, before the model sees any of them, when an item is touched.
        """
        if not self.active:
            return
        grouped: dict[str, dict[Any, list[Any]]] = defaultdict(dict)
        for number, request in enumerate(requests):
            task = getattr(request, "task_name", None) or "unnamed"
            item = getattr(request, "doc_id", None)
            item = f"request {number}" if item is None else item
            grouped[task].setdefault(item, []).append(request)
        for name, items in grouped.items():
            found = self._touched(items)
            mine = self._tasks.setdefault(name, _Task())
            mine.merge(_Task(set(items), found))
            if found:
                self._tell(name, mine)
        self._remember()

    def gather(self) -> None:
        """Add up what every process of a data-parallel run has seen; all have to call it."""
        if not several_processes():
            return
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, self._plain())
        for tasks in everyone:
            self._merge(tasks)

    def watch_cache(self, database: Any) -> None:
        """Remember in a response cache what was checked: cached requests do not come here again.

        Raises
        ------
        UserError
            With ``on_leak=error``, when the cache holds answers to touched items.
        """
        if database is None or self._calibration is None:
            return
        if not self.active:
            database[UNCHECKED] = True
            return
        self._cache = database
        self._unchecked = bool(database.get(UNCHECKED))
        self._merge(database.get(RESERVED) or {})
        for name, task in self._tasks.items():
            if task.touched:
                self._tell(name, task)

    def report(self) -> dict[str, Any] | str:
        """Return the block of the summary: a row for each task, or why there is none."""
        if self._calibration is None:
            return NO_TEXT
        if self.on_leak == "ignore":
            return NOT_CHECKED
        return {name: self._tasks[name].row() for name in sorted(self._tasks)}

    def warnings(self) -> list[str]:
        """Return a sentence for every task with touched items."""
        if not self.active:
            return []
        notes = [_sentence(n, t) for n, t in sorted(self._tasks.items()) if t.touched]
        if self._unchecked:
            notes.append(
                "leak check: the response cache was also filled with on_leak=ignore; items "
                "answered then were not checked"
            )
        return notes

    def _plain(self) -> dict[str, list[Any]]:
        return {name: task.plain() for name, task in self._tasks.items()}

    def _merge(self, tasks: Mapping[str, Sequence[Any]]) -> None:
        for name, plain in tasks.items():
            self._tasks.setdefault(name, _Task()).merge(_Task.from_plain(plain))

    def _remember(self) -> None:
        if self._cache is not None:
            self._cache[RESERVED] = self._plain()

    def _tell(self, name: str, task: _Task) -> None:
        if self.on_leak == "error":
            raise UserError(
                "calibration",
                _sentence(name, task),
                "on_leak=error refuses to evaluate on calibration text",
                "calibrate on other text, or accept it with on_leak=warn",
            )
        log.warning("%s", _sentence(name, task))

    def _touched(self, items: Mapping[Any, Sequence[Any]]) -> dict[Any, tuple[str, str, str]]:
        index = self._ready()
        found: dict[Any, tuple[str, str, str]] = {}
        unplaced: dict[Any, Sequence[str]] = {}
        for item, requests in items.items():
            texts = list(dict.fromkeys(text for r in requests for text in _texts(r)))
            own = _own_texts(requests[0].doc) if _has_document(requests[0]) else []
            if any(_stands_in(text, texts) for text in own):
                self._keep(found, item, _of_document(index, own, texts))
            else:
                unplaced[item] = texts
        shared = _shared(index, {k: t for k, t in unplaced.items() if _has_document(items[k][0])})
        for item, texts in unplaced.items():
            overlaps = (o for text in texts for o in index.overlaps(words(text)))
            self._keep(found, item, next((o for o in overlaps if o.words not in shared), None))
        return found

    def _keep(self, found: dict[Any, Any], item: Any, overlap: Overlap | None) -> None:
        if overlap is not None:
            found[item] = (overlap.kind, self._owners[overlap.sequence], overlap.words)

    def _ready(self) -> ContaminationIndex:
        if self._index is None:
            assert self._calibration is not None
            texts = [decoded(self._tokenizer, s.tolist()) for s in self._calibration.sequences]
            self._index = ContaminationIndex(texts)
            self._owners = owners(self._calibration)
        return self._index


def _order(item: Any) -> tuple[str, Any]:
    return type(item).__name__, item


def _sentence(name: str, task: _Task) -> str:
    row = task.row()
    return (
        f"{row['touched']} of {row['items']} items of task `{name}` ({row['share']:.1%}) stand in "
        f"the calibration text, first: {row['examples'][0]['words']!r}"
    )


def _texts(request: Any) -> Iterator[str]:
    """Yield what the model is shown together with what it is scored on."""
    arguments = [a for a in request.args[:2] if isinstance(a, str)]
    yield "".join(arguments)


def _has_document(request: Any) -> bool:
    return request.request_type != ROLLING and getattr(request, "doc", None) is not None


def _own_texts(document: Any) -> list[str]:
    """Return the texts inside a document, whatever its shape."""
    if isinstance(document, str):
        return [document]
    if isinstance(document, Mapping):
        return [text for value in document.values() for text in _own_texts(value)]
    if isinstance(document, (list, tuple)):
        return [text for value in document for text in _own_texts(value)]
    return []


def _stands_in(text: str, prompts: Sequence[str]) -> bool:
    """Tell whether a text long enough to matter stands as it is in a prompt."""
    plain = text.strip()
    return plain.count(" ") >= SHORTEST - 1 and any(plain in prompt for prompt in prompts)


def _of_document(
    index: ContaminationIndex, own: Sequence[str], prompts: Sequence[str]
) -> Overlap | None:
    """Return the first overlap of a document's texts that the model is shown as well.

    Texts of less than 13 words count where the document has no longer one in the prompt, and of
    them the longest alone: an answer of five words stands in many books.
    """
    shown: ContaminationIndex | None = None
    split_texts = [words(text) for text in own]
    placed = [s for s, t in zip(split_texts, own, strict=True) if _stands_in(t, prompts)]
    main = max(placed, key=len)
    for split in split_texts:
        if len(split) < NGRAM and (split != main or len(main) >= NGRAM):
            continue
        if index.find(split) is None:
            continue
        # Rare, so that long prompts are hardly ever cut into words.
        shown = shown or ContaminationIndex(prompts)
        overlap = index.find(split, within=shown)
        if overlap is not None:
            return overlap
    return None


def _shared(index: ContaminationIndex, items: Mapping[Any, Sequence[str]]) -> set[str]:
    """Return the overlapping words that stand in more than half of the items, and in several."""
    counts: Counter[str] = Counter()
    for texts in items.values():
        counts.update({o.words for text in texts for o in index.overlaps(words(text))})
    return {found for found, count in counts.items() if count > max(1, len(items) / 2)}
