"""What a packer is, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lm_calib_plugin.calibration.sources.base import Context, Document, Order
from lm_calib_plugin.errors import UserError

# A packer gives up after this many documents in a row that it can not use: an endless stream of
# short texts must end in a message.
PATIENCE = 50_000


@dataclass(frozen=True)
class Packed:
    """What a packer cut.

    Parameters
    ----------
    sequences
        Token ids, one list per sequence.
    indices
        What was drawn: ``[document, first token]`` (longdoc), first token of the joined text
        (concat, windows, multilen), document (pad), documents (icl).
    documents
        How many documents were seen.
    truncated
        How many documents lost tokens at the cut.
    facts
        What else the packer tells.
    weights
        One positive number per sequence: its tokens count so many times; None: once.
    """

    sequences: list[list[int]]
    indices: list[Any]
    documents: int
    truncated: int
    facts: dict[str, Any] = field(default_factory=dict)
    weights: list[float] | None = None


class Packer(ABC):
    """Base of every packer; ``order`` is how it wants its documents.

    A class may take fields of the recipe as keyword arguments, named in its registry row.
    """

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


def too_few(found: int, seen: int, context: Context, way_out: str) -> UserError:
    """Return the error for a source that holds too little, with the numbers."""
    if context.of_fold and seen < context.count:
        # A .txt without double blank lines is one document, which is in one fold only.
        way_out += "; more and shorter documents fill every fold: file:my.txt?split=2000"
    return UserError(
        context.count_of,
        f"found {found} windows of {context.seqlen} tokens in {seen} documents{context.of_fold}, "
        f"recipe asks {context.count}",
        f"{context.to_lower}, {way_out}",
    )
