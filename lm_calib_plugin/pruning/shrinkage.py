"""Gram matrices held away from what a few thousand tokens cannot tell."""

from __future__ import annotations

from torch import Tensor

from lm_calib_plugin.statistics import Gram, LayerStats


def damped_gram(stats: LayerStats | None, damp: float, shrink: float, weight: Tensor) -> Tensor:
    """Return ``G + damp * mean(diag G) * I + shrink * diag(G)``, ``[in, in]``.

    In the output error ``tr((W - V) G (W - V)^T)`` both are ridges towards the dense weights, not
    towards zero. The first is the same for all inputs; where a few have huge activations, it holds
    the others very strongly. The second is in units of each input's own energy: it divides all
    correlations by ``1 + shrink``, and inputs without energy stay without.

    Parameters
    ----------
    stats
        Statistics that hold a Gram matrix.
    damp, shrink
        At least 0.
    weight
        Of its device and dtype is the result.
    """
    if not isinstance(stats, Gram):
        raise ValueError("the Gram matrix of the inputs is needed")
    found = stats.gram().to(weight, copy=True)
    diagonal = found.diagonal()
    alive = diagonal > 0
    diagonal.mul_(1.0 + shrink).add_(damp * stats.energy().to(weight).mean() * alive)
    return found
