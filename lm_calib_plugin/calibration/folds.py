"""Folds: every document belongs to one of three parts for ever, so that what chooses a
calibration set and what judges it never share a document.

The part follows from the text alone, not from the source, the order, the seed or the number of
documents: a copy of a document in another corpus is in the same fold. Texts are compared in lower
case with runs of white space as one blank, so that a re-formatted copy is still a copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.sources.base import Document
from lm_calib_plugin.recipe import ALL_FOLDS

# Shares in percent, in the order of the number line that a hash falls on.
SHARES = {"choose": 60, "validate": 20, "judge": 20}


def fold_of(text: str) -> str:
    """Return ``choose``, ``validate`` or ``judge``: the fold of a document, by its text alone."""
    plain = " ".join(text.lower().split())
    hashed = hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(hashed[:8], "big") * 100 >> 64
    for fold, share in SHARES.items():
        if place < share:
            return fold
        place -= share
    raise AssertionError("the shares are 100 percent")


def in_fold(text: str, fold: str) -> bool:
    """Tell whether a text belongs to a fold; everything belongs to ``all``."""
    return fold == ALL_FOLDS or fold_of(text) == fold


def fold_seed(seed: int, fold: str) -> int:
    """Return the seed of token ids drawn without documents: another one in every fold."""
    return seed if fold == ALL_FOLDS else derive_seed(seed, "fold", fold)


class FoldFilter:
    """Lets the documents of one fold through and counts the others."""

    def __init__(self, fold: str) -> None:
        self.fold = fold
        self.left_out = 0

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents of the fold, in the order they come."""
        for document in documents:
            if in_fold(document.text, self.fold):
                yield document
            else:
                self.left_out += 1
