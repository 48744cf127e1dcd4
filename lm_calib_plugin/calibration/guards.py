"""Which of the written texts are kept: every reason to drop one, in the order they apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lm_calib_plugin.calibration.text_cache import Written

REASONS = ("empty", "unfinished", "repetition", "near_duplicate", "perplexity")
REPEATED = 4  # tokens of an n-gram whose repetition is counted
SHARED = 13  # tokens of an n-gram that tells that two texts have a passage in common
SHARE = 0.5  # of its passages known from earlier texts make a text a near-duplicate


@dataclass(frozen=True)
class Guards:
    """What a text must pass.

    Parameters
    ----------
    drop
        Fraction of highest perplexity that goes, of the texts that pass everything else.
    dedup
        Drop texts that repeat an earlier one.
    repetition
        Least share of distinct 4-grams of token ids; 0: off.
    finished
        Whether the model must have ended the text itself.
    percentile
        Keep perplexities strictly below a percentile, as the published code does, instead of
        dropping an exact number.
    """

    drop: float = 0.2
    dedup: bool = True
    repetition: float = 0.5
    finished: bool = False
    percentile: bool = False

    def judge(
        self, texts: Sequence[Written], ids_of: Callable[[Written], Sequence[int]]
    ) -> list[Written]:
        """Return the texts with :attr:`Written.dropped` set, by these guards alone.

        Parameters
        ----------
        ids_of
            Gives the token ids of a text.
        """
        reasons = [self._by_itself(text, ids_of) for text in texts]
        if self.dedup:
            left = [i for i, reason in enumerate(reasons) if not reason]
            for place in near_duplicates([ids_of(texts[i]) for i in left]):
                reasons[left[place]] = "near_duplicate"
        left = [i for i, reason in enumerate(reasons) if not reason]
        scores = [float(texts[i].perplexity or 0.0) for i in left]
        least = below_percentile if self.percentile else all_but_highest
        kept = {left[place] for place in least(scores, self.drop)}
        return [
            replace(text, dropped=reason or ("" if i in kept else "perplexity"))
            for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]

    def _by_itself(self, text: Written, ids_of: Callable[[Written], Sequence[int]]) -> str:
        if text.perplexity is None:
            return "empty"
        if self.finished and not text.finished:
            return "unfinished"
        if self.repetition and distinct_share(ids_of(text)) < self.repetition:
            return "repetition"
        return ""


def distinct_share(ids: Sequence[int], length: int = REPEATED) -> float:
    """Return distinct n-grams over all n-grams; 1 for a text without any."""
    grams = _grams(ids, length)
    return len(set(grams)) / len(grams) if grams else 1.0


def near_duplicates(
    texts: Sequence[Sequence[int]], length: int = SHARED, share: float = SHARE
) -> list[int]:
    """Return the places of texts that repeat earlier ones, which stay.

    A text repeats an earlier one when both are equal, or when ``share`` or more of its distinct
    n-grams stand in the earlier texts that stay, taken together.
    """
    found: list[int] = []
    whole: set[int] = set()
    known: set[int] = set()
    for place, ids in enumerate(texts):
        key, grams = hash(tuple(ids)), set(_grams(ids, length))
        if key in whole or (grams and len(grams & known) >= share * len(grams)):
            found.append(place)
        else:
            whole.add(key)
            known |= grams
    return found


def all_but_highest(scores: Sequence[float], drop: float) -> list[int]:
    """Return the places of all but the ``floor(drop * n)`` highest scores; of ties, later go."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return order[: len(scores) - math.floor(len(scores) * drop + 1e-9)]


def below_percentile(scores: Sequence[float], drop: float) -> list[int]:
    """Return the places of scores strictly below the percentile ``100 * (1 - drop)``.

    The percentile is that of NumPy, linear between two scores (code of arXiv 2410.17711).
    """
    if not scores:
        return []
    bound = np.percentile(scores, 100 * (1 - drop))
    return [i for i, score in enumerate(scores) if score < bound]


def _grams(ids: Sequence[int], length: int) -> list[int]:
    """Return a hash of 64 bits for every n-gram; those of tuples of integers never change."""
    return [hash(tuple(ids[i : i + length])) for i in range(len(ids) - length + 1)]
