"""Gram matrices held away from what a few thousand tokens cannot tell."""

from __future__ import annotations

from torch import Tensor

from lm_calib_plugin.statistics import LayerStats, gram_in


def damped_gram(stats: LayerStats | None, damp: float, shrink: float, weight: Tensor) -> Tensor:
    """Return ``G + damp * mean(diag G) * I + shrink * diag(G)``, ``[in, in]``.

    In the output error ``tr((W - V) G (W - V)^T)`` both are ridges towards the dense weights, not
    towards zero. The first is the same for all inputs that have energy; where a few have huge
    activations, it holds the others very strongly. For the second see :func:`shrunk`.

    Parameters
    ----------
    stats
        Statistics that hold a Gram matrix.
    damp, shrink
        At least 0.
    weight
        Of its device and dtype is the result.
    """
    gram = gram_in(stats).to(weight)
    energy = gram.diagonal()
    found = shrunk(gram, shrink)
    found.diagonal().add_(damp * energy.mean() * (energy > 0))
    return found


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
