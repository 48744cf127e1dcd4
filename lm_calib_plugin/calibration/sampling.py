"""Drawing the next token: penalty, temperature, top-k, top-p, and a pick by a given number.

The steps and their order are those of ``transformers`` generation. The pick is by inverse
distribution function with a number in [0, 1) made beforehand, so that a text depends on its own
numbers alone: not on the batch it is written in, nor on the random generator of a device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lm_calib_plugin.calibration.seeds import derive_seed


@dataclass(frozen=True)
class Decoding:
    """How text is sampled; defaults of the published recipe (arXiv 2410.17711, its code).

    Parameters
    ----------
    temperature
        Divides the logits; > 0.
    top_k
        How many of the likeliest tokens may be drawn; 0: all.
    top_p
        Smallest set of likeliest tokens with at least this probability; 1: all.
    repetition_penalty
        Positive logits of tokens already in the text are divided by it, negative ones
        multiplied; 1: off.
    """

    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 0.95
    repetition_penalty: float = 1.2


UNTRUNCATED = Decoding(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)


@dataclass(frozen=True)
class Schedule:
    """A temperature that moves from ``start`` to ``end`` over the first ``ramp`` tokens.

    The first token after the start token is drawn at ``start``, the token number ``ramp`` after
    it and all later ones at ``end`` (arXiv 2410.17170; its values are not published, these are
    ours).
    """

    start: float = 2.0
    end: float = 1.0
    ramp: int = 20

    def at(self, age: Tensor) -> Tensor:
        """Return the temperature of tokens that follow ``age`` others, in float32."""
        return self.start + (self.end - self.start) * (age / self.ramp).clamp(max=1.0)


def next_tokens(
    logits: Tensor,
    history: Tensor,
    decoding: Decoding,
    allowed: Tensor,
    numbers: Tensor,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Parameters
    ----------
    logits, history, allowed
        As for :func:`candidates`.
    numbers
        ``[batch]``, uniform in [0, 1).
    temperature
        ``[batch]``, in place of the one of ``decoding``.

    Returns
    -------
    tuple of Tensor
        ``[batch]`` int64 ids, and a bool: whether every row could be drawn from. It stays on the
        device, so that looking at it can wait; with NaN or infinity the ids mean nothing.
    """
    if temperature is not None:
        logits, decoding = logits / temperature[:, None], replace(decoding, temperature=1.0)
    if decoding.top_k or decoding.top_p < 1:
        ids, probabilities = candidates(logits, history, decoding, allowed)
        return pick(ids, probabilities, numbers), probabilities[:, 0].isfinite().all()
    probabilities = _scores(logits, history, decoding, allowed).softmax(-1)
    # In float64: a sum over a whole vocabulary in float32 would lose the unlikely tokens.
    reached = probabilities.cumsum(-1, dtype=torch.float64)
    aim = numbers[:, None].double() * reached[:, -1:]
    place = torch.searchsorted(reached, aim, right=True)[:, 0]
    return place.clamp(max=logits.shape[-1] - 1), reached[:, -1].isfinite().all()


def _scores(logits: Tensor, history: Tensor, decoding: Decoding, allowed: Tensor) -> Tensor:
    """Return the logits after mask, repetition penalty and temperature."""
    scores = logits.masked_fill(~allowed, -torch.inf)
    if decoding.repetition_penalty != 1:
        seen = scores.gather(1, history)
        penalty = decoding.repetition_penalty
        scores = scores.scatter(1, history, torch.where(seen < 0, seen * penalty, seen / penalty))
    return scores / decoding.temperature


def candidates(
    logits: Tensor, history: Tensor, decoding: Decoding, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the tokens that may come next and their probabilities, likeliest first.

    Parameters
    ----------
    logits
        ``[batch, vocabulary]`` float32, of the next token.
    history
        ``[batch, length]`` int64, the tokens so far, prefix included.
    allowed
        ``[vocabulary]`` bool, False for tokens that must not be written.

    Returns
    -------
    tuple of Tensor
        ids and probabilities, both ``[batch, candidates]``; probabilities of a row sum to one,
        tokens cut by top-p have probability zero. With NaN or infinity in the logits of a row,
        or no token allowed, its first probability is NaN.
    """
    scores = _scores(logits, history, decoding, allowed)
    count = min(decoding.top_k or scores.shape[-1], scores.shape[-1])
    values, ids = torch.topk(scores, count, dim=-1, sorted=True)
    probabilities = values.softmax(-1)
    if decoding.top_p < 1:
        # Probability of a token and of everything less likely, summed from the small end.
        tail = probabilities.flip(-1).cumsum(-1).flip(-1)
        cut = tail <= 1 - decoding.top_p
        cut[:, 0] = False
        probabilities = probabilities.masked_fill(cut, 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return ids, probabilities


def pick(ids: Tensor, probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Return one id per row by inverse distribution function.

    Parameters
    ----------
    ids, probabilities
        ``[batch, candidates]``.
    numbers
        ``[batch]``, uniform in [0, 1).

    Returns
    -------
    Tensor
        ``[batch]`` int64.
    """
    reached = probabilities.cumsum(-1)
    place = (reached <= numbers[:, None] * reached[:, -1:]).sum(-1)
    # Rounding may carry the number past the end; never onto a token of probability zero.
    last = ((probabilities > 0).sum(-1) - 1).clamp(min=0)
    return ids.gather(1, torch.minimum(place, last)[:, None])[:, 0]


def uniform_numbers(seed: int, first: int, count: int, length: int) -> Tensor:
    """Return ``[count, length]`` float32 numbers in [0, 1) for texts ``first`` and following.

    Every text has a generator of its own, made of the seed and its number.
    """
    rows = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(derive_seed(seed, "text", number))
        rows.append(torch.rand(length, generator=generator))
    return torch.stack(rows)
