"""What is wrong with a written text: loops, repetition, length, refusals. Knows ids and words only.

Perplexity by teacher forcing misses what goes wrong once a model reads its own words, so this is
measured on texts that it wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# An end of a text that is one piece, over and over: at least so many times, and so many tokens.
LOOP_TIMES = 3
LOOP_TOKENS = 8
REPEATED = 4  # tokens of the pieces whose repetition is counted
# What an answer that refuses begins with, in English, lower case, with straight apostrophes.
REFUSALS = (
    "as a language model",
    "as an ai",
    "i am not able to",
    "i am sorry",
    "i am unable to",
    "i apologize",
    "i can not",
    "i can't",
    "i cannot",
    "i do not feel comfortable",
    "i don't feel comfortable",
    "i must decline",
    "i won't",
    "i'm not able to",
    "i'm sorry",
    "i'm unable to",
    "my apologies",
    "sorry,",
    "unfortunately, i can",
)
LOOP_DEFINITION = (
    f"a text loops when it ends in one piece of any length written at least {LOOP_TIMES} times in "
    f"a row, {LOOP_TOKENS} tokens or more in all; the last time may be cut short"
)


@dataclass(frozen=True)
class Loop:
    """The end of a text that repeats: tokens of the piece, tokens of all, as token ids."""

    piece: tuple[int, ...]
    tokens: int

    @property
    def times(self) -> float:
        """How often the piece stands there."""
        return self.tokens / len(self.piece)


def loop_of(ids: Sequence[int]) -> Loop | None:
    """Return the loop that a text ends in, with the shortest piece; None where there is none.

    Parameters
    ----------
    ids
        Token ids without an end token.
    """
    count = len(ids)
    for length in range(1, count // LOOP_TIMES + 1):
        equal = 0
        while equal < count - length and ids[count - 1 - equal] == ids[count - 1 - equal - length]:
            equal += 1
        tokens = equal + length
        if tokens >= max(LOOP_TIMES * length, LOOP_TOKENS):
            start = count - tokens
            return Loop(tuple(ids[start : start + length]), tokens)
    return None


def repeated_share(ids: Sequence[int], n: int = REPEATED) -> float:
    """Return the share of n-grams that stood in the text before; 0 for a text without any."""
    grams = _grams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_share(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Return distinct n-grams over n-grams, of all texts together (distinct-n); None without."""
    grams = [gram for ids in texts for gram in _grams(ids, n)]
    return len(set(grams)) / len(grams) if grams else None


def refuses(text: str) -> bool:
    """Tell whether a text begins as a refusal does, see :data:`REFUSALS`."""
    plain = text.strip().lstrip("\"'*_ ").lower().replace("\u2019", "'")
    return plain.startswith(REFUSALS)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Return the place (from 0) of the first token that differs; None for equal texts.

    Where one text ends and the other goes on, that is the place of the first token more.
    """
    for place, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return place
    return None if len(a) == len(b) else min(len(a), len(b))


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
