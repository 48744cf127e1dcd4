"""The check that nothing which is meant to lower the output error raises it."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_calib_plugin.errors import NumericalError


def check_fallen(before: Tensor, error: Tensor, gram: Tensor, stage: str) -> None:
    """Raise unless ``e^T G e`` is at most ``before`` in every row, up to rounding.

    Parameters
    ----------
    before
        The error of each row at the start, ``[out]``.
    error
        Dense minus present weights ``e``, ``[out, in]``.
    gram
        ``G``, ``[in, in]``.
    stage
        What was done, for the message.

    Raises
    ------
    NumericalError
        When a row is worse, or no number.
    """
    after = ((error @ gram) * error).sum(1)
    # Terms of both signs may nearly cancel: what they are rounded to depends on their sizes.
    sizes = ((error.abs() @ gram.abs()) * error.abs()).sum(1)
    slack = torch.finfo(error.dtype).eps ** 0.5
    if not bool((after <= before + slack * (before.abs() + sizes)).all()):
        raise NumericalError("layer", stage, "the output error rose", "raise damp")
