"""How far two next-token distributions are apart, token by token: exact, over all the vocabulary.

``P`` is that of the dense model, ``Q`` that of the compressed one, both by teacher forcing on one
text. After arXiv 2409.11233 (Jensen-Shannon divergence as a measure of compression).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

LN2 = math.log(2.0)
# Numbers of one float32 matrix [tokens, vocabulary] in work at a time: 64 MiB.
_CHUNK = 2**24


@dataclass
class TokenDivergence:
    """What was measured at each scored position, ``[tokens]``, float64 on the CPU.

    ``js`` (nats, at most ln 2) and ``kl`` (KL(P||Q), nats), ``tv`` (total variation, 0 to 1),
    ``flipped`` (1 where the most likely token differs), and the negative log-likelihood of the true
    next token, ``nll_dense`` and ``nll_compressed`` (nats).
    """

    js: Tensor
    kl: Tensor
    tv: Tensor
    flipped: Tensor
    nll_dense: Tensor
    nll_compressed: Tensor

    def __len__(self) -> int:
        return int(self.js.numel())

    def last(self, count: int) -> TokenDivergence:
        """Return the last positions alone."""
        return TokenDivergence(*(getattr(self, f.name)[len(self) - count :] for f in fields(self)))

    @classmethod
    def joined(cls, parts: list[TokenDivergence]) -> TokenDivergence:
        """Return several as one, in order."""
        empty = [torch.zeros(0, dtype=torch.float64)]
        names = [field.name for field in fields(cls)]
        return cls(*(torch.cat([getattr(p, n) for p in parts] or empty) for n in names))


def token_divergence(dense: Tensor, compressed: Tensor, targets: Tensor) -> TokenDivergence:
    """Compare logits.

    Parameters
    ----------
    dense, compressed
        Logits or log-probabilities ``[tokens, vocabulary]``, any float dtype; the second may be on
        another device.
    targets
        The true next tokens, ``[tokens]``.

    Notes
    -----
    With ``m = log((P + Q) / 2)``, JS is half the sum of ``P (log P - m)`` and ``Q (log Q - m)``, in
    float32 from the log-softmax over all tokens, summed in float64 by halves. Equal rows give
    exactly 0: there ``m`` is ``log P`` bit by bit, as it is set so and not computed.
    """
    if dense.shape != compressed.shape or targets.shape != dense.shape[:1]:
        raise ValueError(
            f"expected logits of one shape and a target each, got {tuple(dense.shape)}, "
            f"{tuple(compressed.shape)} and {tuple(targets.shape)}"
        )
    step = max(1, _CHUNK // max(1, dense.shape[1]))
    parts = [
        _one(dense[i : i + step], compressed[i : i + step], targets[i : i + step])
        for i in range(0, dense.shape[0], step)
    ]
    return TokenDivergence.joined(parts)


def _one(dense: Tensor, compressed: Tensor, targets: Tensor) -> TokenDivergence:
    log_p = functional.log_softmax(dense.float(), dim=-1)
    log_q = functional.log_softmax(compressed.to(dense.device).float(), dim=-1)
    p, q = log_p.exp(), log_q.exp()
    gap = log_p - log_q
    # Where a token is impossible to both there is nothing to compare.
    gap = torch.where(torch.isneginf(log_p) & torch.isneginf(log_q), 0.0, gap)
    # log P - m = log 2 - log(1 + Q/P) = log 2 - softplus(-gap), and likewise for Q.
    half_p = torch.where(p > 0, p * (LN2 - functional.softplus(-gap)), 0.0)
    half_q = torch.where(q > 0, q * (LN2 - functional.softplus(gap)), 0.0)
    js = 0.5 * (half_p.sum(-1, dtype=torch.float64) + half_q.sum(-1, dtype=torch.float64))
    same = (gap == 0).all(-1)
    kl = torch.where(p > 0, p * gap, 0.0).sum(-1, dtype=torch.float64)
    where = targets.to(dense.device)[:, None]
    found = [
        torch.where(same, 0.0, js).clamp(0.0, LN2),
        torch.where(same, 0.0, kl).clamp(min=0.0),
        0.5 * (p - q).abs().sum(-1, dtype=torch.float64),
        (log_p.argmax(-1) != log_q.argmax(-1)).double(),
        -log_p.gather(1, where)[:, 0].double(),
        -log_q.gather(1, where)[:, 0].double(),
    ]
    return TokenDivergence(*(one.cpu() for one in found))
