"""Shrinkage of a Gram matrix: what a few thousand tokens tell of correlations is noisy."""

from __future__ import annotations

from torch import Tensor


def shrunk(gram: Tensor, amount: float) -> Tensor:
    """Return ``G + amount * diag(G)``: all correlations divided by ``1 + amount``.

    In the output error ``tr((W - V) G (W - V)^T)`` this is a ridge towards the dense weights, not
    towards zero, in units of each input's own energy; so a few inputs with huge activations do not
    decide how strongly the others are held, as they do with a multiple of the mean of the
    diagonal. Inputs without energy stay without.

    Parameters
    ----------
    gram
        ``[in, in]``; not changed.
    amount
        At least 0.
    """
    found = gram.clone()
    found.diagonal().mul_(1.0 + amount)
    return found
