"""The check that nothing which is meant to lower the output error raises it."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_calib_plugin.errors import NumericalError


def check_fallen(
    before: Tensor, error: Tensor, gram: Tensor, stage: str, after: Tensor | None = None
) -> None:
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
    after
        ``e^T G e`` of each row, ``[out]``, where it has been computed from ``e`` already.

    Raises
    ------
    NumericalError
        When a row is worse, or no number.
    """
    if after is None:
        after = row_errors(error, gram)
    slack = torch.finfo(error.dtype).eps ** 0.5
    doubtful = ~(after <= before + slack * before.abs())
    if bool(doubtful.any()):
        # Terms of both signs may nearly cancel: what they are rounded to depends on their sizes.
        sizes = row_errors(error[doubtful].abs(), gram.abs())
        before, after = before[doubtful], after[doubtful]
        if not bool((after <= before + slack * (before.abs() + sizes)).all()):
            raise NumericalError("layer", stage, "the output error rose", "raise damp")


def row_errors(error: Tensor, gram: Tensor) -> Tensor:
    """Return ``e^T G e`` of every row of ``[out, in]``, ``[out]``."""
    return (error @ gram).mul_(error).sum(1)
