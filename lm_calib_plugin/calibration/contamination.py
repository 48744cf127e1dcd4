"""Whether evaluated text stands in the calibration text: 13-grams and whole short texts.

Words are compared, not characters: NFKC, casefold, punctuation removed, split at white space. In
scripts that are written without spaces every character is a word. A text of 13 words or more
overlaps when any 13 consecutive words of it stand in one calibration sequence; a text of 5 to 12
words when all of it does; a shorter one never does, for chance would find it anywhere. The 13 is
that of the contamination study of GPT-3 (https://arxiv.org/abs/2005.14165, appendix C).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NGRAM = 13
SHORTEST = 5
GRAM, WHOLE = f"{NGRAM}-gram", "whole text"

_PUNCTUATION = re.compile(r"[^\w\s]|_")
# Thai, Lao, Myanmar, Khmer, kana, and Chinese characters.
_NO_SPACES = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
)
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, with its bits well mixed

_Hashes = NDArray[np.uint64]


def words(text: str) -> list[str]:
    """Return the normalized words of a text."""
    plain = _PUNCTUATION.sub("", unicodedata.normalize("NFKC", text).casefold())
    return _NO_SPACES.sub(r" \1 ", plain).split()


@dataclass(frozen=True)
class Overlap:
    """What was found: ``13-gram`` or ``whole text``, the first such words, the sequence."""

    kind: str
    words: str
    sequence: int


class ContaminationIndex:
    """The word n-grams of a calibration set, as 64-bit hashes.

    Parameters
    ----------
    texts
        The decoded calibration sequences. No n-gram spans two of them.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._known: dict[str, int] = {}
        self._texts = [self._hashed(words(text)) for text in texts]
        self._sorted: dict[int, tuple[_Hashes, NDArray[np.int64]]] = {}

    def find(self, text: Sequence[str], within: ContaminationIndex | None = None) -> Overlap | None:
        """Return the first overlap of normalized words with the calibration text.

        Parameters
        ----------
        text
            The words, as :func:`words` gives them.
        within
            Count only what stands in this other index too.
        """
        return next(self.overlaps(text, within), None)

    def overlaps(
        self, text: Sequence[str], within: ContaminationIndex | None = None
    ) -> Iterator[Overlap]:
        """Yield every overlap, in order."""
        size = min(len(text), NGRAM)
        if size < SHORTEST:
            return
        grams = _grams(self._hashed(text), size)
        sequences = self._sequences_of(grams, size)
        hits = sequences >= 0
        if within is not None and hits.any():
            hits &= within._sequences_of(_grams(within._hashed(text), size), size) >= 0
        for place in np.flatnonzero(hits):
            shown = " ".join(text[place : place + size])
            yield Overlap(GRAM if size == NGRAM else WHOLE, shown, int(sequences[place]))

    def _sequences_of(self, grams: _Hashes, size: int) -> NDArray[np.int64]:
        """Return for each n-gram the first calibration sequence that holds it, or -1."""
        if size not in self._sorted:
            self._sorted[size] = self._table(size)
        known, owners = self._sorted[size]
        if not len(known):
            return np.full(len(grams), -1)
        places = np.minimum(np.searchsorted(known, grams), len(known) - 1)
        return np.where(known[places] == grams, owners[places], -1)

    def _table(self, size: int) -> tuple[_Hashes, NDArray[np.int64]]:
        parts = [_grams(hashes, size) for hashes in self._texts]
        counts = [len(part) for part in parts]
        owners = np.repeat(np.arange(len(parts)), counts)
        grams = np.concatenate([*parts, np.empty(0, np.uint64)])
        known, first = np.unique(grams, return_index=True)
        return known, owners[first]

    def _hashed(self, text: Sequence[str]) -> _Hashes:
        known = self._known
        for word in text:
            if word not in known:
                # A fixed hash: that of Python differs from process to process.
                raw = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8)
                known[word] = int.from_bytes(raw.digest(), "little")
        return np.fromiter((known[word] for word in text), np.uint64, len(text))


def _grams(hashes: _Hashes, size: int) -> _Hashes:
    """Return a hash of every ``size`` consecutive words: a polynomial modulo 2^64."""
    count = len(hashes) - size + 1
    if count < 1:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for place in range(size):
        total = total * _BASE + hashes[place : place + count]
    return total
