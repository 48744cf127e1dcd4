"""The weight that a layer should have had, given what compressed blocks before it do."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.statistics import Gram, LayerStats

RIDGE = 0.1


def corrected(weight: Tensor, stats: LayerStats | None, cross: Tensor, amount: float) -> Tensor:
    """Return the weight whose outputs are nearest to those of the dense model.

    A layer receives ``X`` from compressed blocks, where it received ``Y`` in the dense model. With
    ``D = X^T (Y - X)`` and ``R`` a tenth of the diagonal of ``G = X^T X``, ::

        W + amount * ((G + R)^-1 D W^T)^T

    minimizes ``||X V^T - Y W^T||^2 + ||R^(1/2) (V - W)^T||^2`` for ``amount = 1``. To compress this
    weight on ``G`` is to compress ``W`` against the outputs of the dense model, whatever the
    method (the asymmetric calibration of arXiv 2504.02692).

    Parameters
    ----------
    weight
        Dense weight ``W``, ``[out, in]``; not changed.
    stats
        Statistics of ``X`` that hold its Gram matrix.
    cross
        ``D``, ``[in, in]``.
    amount
        0 to 1.

    Raises
    ------
    NumericalError
        When the Gram matrix cannot be factored.
    """
    if not isinstance(stats, Gram):
        raise ValueError("a correction needs the Gram matrix of the inputs")
    gram = stats.gram().to(weight, copy=True)
    diagonal = gram.diagonal()
    diagonal.mul_(1.0 + RIDGE)
    # Inputs without energy have nothing to give either.
    diagonal[diagonal == 0] = 1.0
    for dtype in (torch.float32, torch.float64):
        lower, failed = torch.linalg.cholesky_ex(gram.to(dtype))
        if not failed.item():
            change = torch.cholesky_solve(cross.to(lower), lower).to(weight)
            return weight + amount * (weight @ change.t())
    raise NumericalError(
        "Gram matrix", "correction", "not positive definite", "use more calibration tokens"
    )
