"""First and second moments of the input and the output of a part of a model, together."""

from __future__ import annotations

import torch
from torch import Tensor


class JointMoments:
    """Weighted means, and with ``products`` covariances, of rows x and y, in float64.

    Covariances are summed around the running mean of what was seen, in the pairwise form of Chan,
    Golub and LeVeque, so that large means cost no digits and chunks can be of any size.

    Parameters
    ----------
    inputs, outputs
        Widths of x and y.
    products
        Whether covariances are kept.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        products: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.count = 0.0
        self.device = torch.device(device)

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=self.device)

        self.mean_input, self.mean_output = zeros(inputs), zeros(outputs)
        self._inner = zeros(inputs, inputs) if products else None
        self._cross = zeros(outputs, inputs) if products else None

    def update(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Add rows ``x`` ``[rows, inputs]`` and ``y`` ``[rows, outputs]``.

        ``weights`` (``[rows]``, default 1) tell how many times each row counts.
        """
        x, y = x.detach().to(self.device).double(), y.detach().to(self.device).double()
        ones = torch.ones(x.shape[0], dtype=torch.float64, device=self.device)
        w = ones if weights is None else weights.to(self.device).double()
        added = float(w.sum())
        if not added:
            return
        mean_x, mean_y = (w @ x) / added, (w @ y) / added
        step_x, step_y = mean_x - self.mean_input, mean_y - self.mean_output
        total = self.count + added
        if self._inner is not None and self._cross is not None:
            root = w.sqrt()[:, None]
            dx, dy = (x - mean_x) * root, (y - mean_y) * root
            between = self.count * added / total
            self._inner += dx.t() @ dx + between * torch.outer(step_x, step_x)
            self._cross += dy.t() @ dx + between * torch.outer(step_y, step_x)
        self.mean_input += step_x * (added / total)
        self.mean_output += step_y * (added / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Return the covariance of x, ``[inputs, inputs]``."""
        assert self._inner is not None
        return self._inner / max(self.count, 1e-300)

    def cross_covariance(self) -> Tensor:
        """Return the covariance of y and x, ``[outputs, inputs]``."""
        assert self._cross is not None
        return self._cross / max(self.count, 1e-300)

    def is_finite(self) -> bool:
        """Tell whether nothing seen so far was NaN or infinite."""
        kept = (self.mean_input, self.mean_output, self._inner, self._cross)
        return all(bool(part.isfinite().all()) for part in kept if part is not None)


class ChannelVariance:
    """Weighted mean and variance of every input channel, over all rows together, in float64.

    Parameters
    ----------
    width
        Number of channels.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0.0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self.mean)

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add rows ``x`` ``[rows, width]``; ``weights`` ``[rows]`` count them, default 1."""
        x = x.detach().to(self.mean.device).double()
        ones = torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
        w = ones if weights is None else weights.to(x.device).double()
        added = float(w.sum())
        if not added:
            return
        mean = (w @ x) / added
        step, total = mean - self.mean, self.count + added
        self._squares += w @ (x - mean).square() + step.square() * (self.count * added / total)
        self.mean += step * (added / total)
        self.count = total

    def variance(self) -> Tensor:
        """Return the variance of each channel around its mean, ``[width]``."""
        return self._squares / max(self.count, 1e-300)

    def is_finite(self) -> bool:
        """Tell whether nothing seen so far was NaN or infinite."""
        return bool(self.mean.isfinite().all() and self._squares.isfinite().all())
