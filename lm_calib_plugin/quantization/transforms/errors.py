"""The squared output error of weights that are scaled, rounded and scaled back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lm_calib_plugin.statistics import output_error


def weight_error(
    weights: Sequence[Tensor],
    s: Tensor,
    gram: Tensor,
    rounded: Callable[[int, Tensor], Tensor],
    noise: Tensor | None = None,
) -> float:
    """Return the squared output error, summed over layers and calibration tokens.

    Parameters
    ----------
    weights
        ``[out_i, in]``, float32, of the layers that read the input.
    s
        Factors of the columns, ``[in]``.
    gram
        ``G = X^T X`` of the input before it is divided by ``s``, ``[in, in]``.
    rounded
        ``rounded(i, w)`` brings a weight to its grid.
    noise
        Summed squared rounding error of each channel of the divided input, ``[in]``.

    Notes
    -----
    A layer returns ``(X / s + E) Q(W s)^T`` instead of ``X W^T``, with ``E`` the rounding error of
    the input. With ``D = Q(W s) / s - W`` the difference is ``X D^T + E Q(W s)^T``. When the
    elements of ``E`` are independent of each other and of ``X``, the expected square is
    ``tr(D G D^T) + sum_j noise_j ||Q(W s)_j||^2``.
    """
    total = 0.0
    for i, weight in enumerate(weights):
        levels = rounded(i, weight * s)
        total += output_error(levels / s - weight, gram)
        if noise is not None:
            total += float(levels.square().sum(dim=0) @ noise)
    return total
