"""The weight that a layer should have had, given what compressed blocks before it do."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.statistics import LayerStats, cholesky_factors, gram_in

RIDGE = 0.1


def input_shift(stats: LayerStats | None, cross: Tensor) -> Tensor:
    """Return the ``T``, ``[in, in]``, for which ``W + W T^T`` comes nearest to the dense outputs.

    A layer receives ``X`` from compressed blocks, where it received ``Y`` in the dense model. With
    ``D = X^T (Y - X)``, ``R`` a tenth of the diagonal of ``G = X^T X`` and ``T = (G + R)^-1 D``,
    ``V = W + W T^T`` minimizes ``||X V^T - Y W^T||^2 + ||R^(1/2) (V - W)^T||^2``. To compress
    ``V`` on ``G`` is to compress ``W`` against the outputs of the dense model, whatever the method
    (the asymmetric calibration of arXiv 2504.02692).

    Parameters
    ----------
    stats
        Statistics of ``X`` that hold its Gram matrix.
    cross
        ``D``, ``[in, in]``.

    Raises
    ------
    NumericalError
        When the products are no numbers or the Gram matrix cannot be factored.
    """
    if not bool(cross.isfinite().all()):
        raise NumericalError("layer", "correction", "NaN or Inf in the activations")
    gram = gram_in(stats).to(cross, copy=True)
    diagonal = gram.diagonal()
    diagonal.mul_(1.0 + RIDGE)
    # Inputs without energy have nothing to give either.
    diagonal[diagonal == 0] = 1.0
    lower = next(cholesky_factors(gram), None)
    if lower is None:
        raise NumericalError(
            "layer", "correction", "not positive definite", "use more calibration tokens"
        )
    return torch.cholesky_solve(cross.to(lower), lower).to(cross)
