"""Packers: how documents are cut into sequences of at most ``seqlen`` tokens.

No special token is put inside a window (``longdoc``, ``concat``, ``windows``); a row of ``pad``
is a document as the tokenizer writes it by default, with its start token where it adds one.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.sources.base import Context, Document, Order
from lm_calib_plugin.calibration.tokens import encode, encode_joined
from lm_calib_plugin.errors import UserError

# `longdoc` gives up after this many documents in a row without one that is long enough: an
# endless stream of short texts must end in a message.
PATIENCE = 50_000
# `concat` reads a source up to this many tokens (at least eight times what is asked) and draws
# its windows there; WikiText-2 (2.4 M tokens) is read whole, C4 is not.
POOL_TOKENS = 1 << 22
# `windows` reads this many characters: more than the 5,000 texts of 2,048 tokens of the paper.
WINDOW_CHARACTERS = 1 << 26
BATCH = 1 << 20  # characters tokenized at a time


@dataclass(frozen=True)
class Packed:
    """What a packer cut.

    Parameters
    ----------
    sequences
        Token ids, one list per sequence.
    indices
        What was drawn: ``[document, first token]`` (longdoc), first token of the joined text
        (concat, windows), document (pad).
    documents
        How many documents were seen.
    truncated
        How many documents lost tokens at the cut.
    facts
        What else the packer tells.
    """

    sequences: list[list[int]]
    indices: list[Any]
    documents: int
    truncated: int
    facts: dict[str, Any] = field(default_factory=dict)


class Packer(ABC):
    """Base of every packer; ``order`` is how it wants its documents."""

    order: ClassVar[Order] = "stored"

    @abstractmethod
    def pack(self, documents: Iterable[Document], context: Context, joiner: str) -> Packed:
        """Cut ``context.count`` sequences.

        Raises
        ------
        UserError
            When the documents do not hold enough; the numbers are named.
        """

    @abstractmethod
    def windows(self, texts: Sequence[str], context: Context, joiner: str) -> int:
        """Return how many sequences could be cut from these texts."""


class LongDocument(Packer):
    """One window, uniformly drawn, inside one document longer than ``seqlen`` tokens.

    Documents are visited in a seeded order without replacement, as the C4 loaders of SparseGPT
    and Wanda do (there with replacement).
    """

    order = "shuffled"

    def pack(self, documents: Iterable[Document], context: Context, joiner: str) -> Packed:
        """Tokenize documents one by one until enough windows are found."""
        generator = random.Random(derive_seed(context.seed, "window"))  # noqa: S311
        sequences: list[list[int]] = []
        indices: list[Any] = []
        seen = misses = 0
        for document in documents:
            seen += 1
            misses += 1
            ids = _if_longer(document.text, context)
            if ids:
                start = generator.randrange(len(ids) - context.seqlen + 1)
                sequences.append(ids[start : start + context.seqlen])
                indices.append([document.number, start])
                misses = 0
            if len(sequences) == context.count or misses == PATIENCE:
                break
        if len(sequences) < context.count:
            raise _too_few(len(sequences), seen, context, "or set pack=concat")
        return Packed(sequences, indices, seen, truncated=len(sequences))

    def windows(self, texts: Sequence[str], context: Context, joiner: str) -> int:
        """Count the texts that are long enough."""
        return sum(bool(_if_longer(text, context)) for text in texts)


class Concatenate(Packer):
    """Documents joined, tokenized, cut into windows that do not overlap, drawn with the seed."""

    def pack(self, documents: Iterable[Document], context: Context, joiner: str) -> Packed:
        """Read up to the bound, cut, draw without replacement."""
        bound = max(POOL_TOKENS, 8 * context.count * context.seqlen)
        ids = array("q")  # a list of Python integers would take five times the memory
        batch: list[str] = []
        seen = size = 0
        whole = True
        for document in documents:
            seen += 1
            batch.append(document.text)
            size += len(document.text)
            if size > BATCH:
                # The joiner between two batches belongs to the earlier one.
                ids.extend(encode_joined(context.tokenizer, [*batch, ""], joiner))
                batch, size = [], 0
                if len(ids) >= bound:
                    whole = False
                    break
        ids.extend(encode_joined(context.tokenizer, batch, joiner))
        starts = list(range(0, len(ids) - context.seqlen + 1, context.seqlen))
        if len(starts) < context.count:
            raise _too_few(len(starts), seen, context, "or give more text")
        random.Random(derive_seed(context.seed, "window")).shuffle(starts)  # noqa: S311
        drawn = starts[: context.count]
        return Packed(
            [ids[start : start + context.seqlen].tolist() for start in drawn],
            list(drawn),
            seen,
            truncated=0,
            facts={"windows": len(starts), "read_whole": whole},
        )

    def windows(self, texts: Sequence[str], context: Context, joiner: str) -> int:
        """Count the whole windows of the joined texts."""
        return len(encode_joined(context.tokenizer, texts, joiner)) // context.seqlen


class Windows(Packer):
    """Documents joined, tokenized once, windows at random starts, with replacement.

    Windows may overlap, as in the loaders of arXiv 2410.17711 for text of its own and Wikipedia.
    Nothing is tokenized in pieces, so the text read is bounded by its characters.
    """

    def pack(self, documents: Iterable[Document], context: Context, joiner: str) -> Packed:
        """Read up to the bound, tokenize, draw every window by itself."""
        bound = max(WINDOW_CHARACTERS, 64 * context.count * context.seqlen)
        texts: list[str] = []
        size = 0
        whole = True
        for document in documents:
            if size > bound:
                whole = False
                break
            texts.append(document.text)
            size += len(document.text)
        ids = encode(context.tokenizer, joiner.join(texts))
        last = len(ids) - context.seqlen
        if last < 0:
            raise _too_few(0, len(texts), context, "or give more text")
        generator = random.Random(derive_seed(context.seed, "window"))  # noqa: S311
        starts = [generator.randint(0, last) for _ in range(context.count)]
        return Packed(
            [ids[start : start + context.seqlen] for start in starts],
            list(starts),
            len(texts),
            truncated=0,
            facts={"windows": last + 1, "read_whole": whole},
        )

    def windows(self, texts: Sequence[str], context: Context, joiner: str) -> int:
        """Return what is asked, as any place serves any number of times, or 0 for too little."""
        enough = len(encode(context.tokenizer, joiner.join(texts))) >= context.seqlen
        return context.count if enough else 0


class Pad(Packer):
    """One document a row, cut at ``seqlen``; shorter documents stay short.

    The name says what others do with the short rows. Here nothing is stored for a pad, so that
    no statistic can count one.
    """

    order = "shuffled"

    def pack(self, documents: Iterable[Document], context: Context, joiner: str) -> Packed:
        """Take the first documents that hold any text."""
        sequences: list[list[int]] = []
        indices: list[Any] = []
        seen = truncated = empty = 0
        for document in documents:
            seen += 1
            ids = encode(context.tokenizer, document.text, special=True) if document.text else []
            if document.text.strip() and ids:
                truncated += len(ids) > context.seqlen
                sequences.append(ids[: context.seqlen])
                indices.append(document.number)
            else:
                empty += 1
            if len(sequences) == context.count or empty == PATIENCE:
                break
        if len(sequences) < context.count:
            raise _too_few(len(sequences), seen, context, "or give more documents")
        return Packed(sequences, indices, seen, truncated, {"empty": empty})

    def windows(self, texts: Sequence[str], context: Context, joiner: str) -> int:
        """Count the texts that are not empty."""
        return sum(bool(text.strip()) for text in texts)


def _if_longer(text: str, context: Context) -> list[int]:
    """Return the ids of a text of more than ``seqlen`` tokens, else nothing.

    A token stands for at least one byte, so most short texts need not be tokenized.
    """
    if len(text.encode()) <= context.seqlen:
        return []
    ids = encode(context.tokenizer, text)
    return ids if len(ids) > context.seqlen else []


def _too_few(found: int, seen: int, context: Context, way_out: str) -> UserError:
    return UserError(
        context.count_of,
        f"found {found} windows of {context.seqlen} tokens in {seen} documents{context.of_fold}, "
        f"recipe asks {context.count}",
        f"{context.to_lower}, {way_out}",
    )
