"""A bounded, evenly spread sample of input rows, to measure output errors on."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class TokenSample:
    """Every ``stride``-th input row, in the order in which rows arrive.

    Which rows are kept depends on their running number only, never on how they were chunked.

    Parameters
    ----------
    expected
        Number of rows that will arrive (an upper bound will do).
    limit
        Number of rows to keep at most when ``expected`` rows arrive.
    start
        Running number of the first row: how many rows others take before it.
    """

    def __init__(self, expected: int, limit: int = 512, start: int = 0) -> None:
        self.stride = max(1, -(-expected // limit))
        self.start = start
        self.seen = start
        self._rows: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take what is due of the rows ``x``, shape ``[tokens, in]``."""
        first = -self.seen % self.stride
        if first < x.shape[0]:
            self._rows.append(x[first :: self.stride].detach().float().clone())
        self.seen += x.shape[0]

    def divided(self, by: Tensor) -> TokenSample:
        """Return the sample of inputs divided by ``by``, ``[in]``, channel by channel."""
        made = copy.copy(self)
        made._rows = [rows / by.to(rows) for rows in self._rows]
        return made

    @property
    def arrived(self) -> int:
        """Number of rows that arrived here."""
        return self.seen - self.start

    @property
    def kept(self) -> int:
        """Number of rows kept here."""
        return sum(len(rows) for rows in self._rows)

    def replace(self, rows: Tensor, arrived: int) -> None:
        """Hold these rows, ``[kept, in]``, of all that ``arrived`` here and elsewhere."""
        self.start, self.seen = 0, arrived
        self._rows = [rows] if len(rows) else []

    def rows(self) -> Tensor | None:
        """Return the kept rows, ``[kept, in]`` in float32, or None when nothing arrived."""
        return torch.cat(self._rows) if self._rows else None


def output_energy(weight: Tensor, rows: Tensor) -> float:
    """Return ``||X W^T||^2`` for ``W [out, in]`` on input rows ``X [tokens, in]``."""
    return float((rows.to(weight.device) @ weight.t()).square().sum(dtype=torch.float64))


def relative_error(
    before: Tensor, after: Tensor, rows: Tensor | None, energy: float | None = None
) -> float | None:
    """Return ``||X (W' - W)^T||^2 / ||X W^T||^2`` on input rows ``X``.

    Parameters
    ----------
    before, after
        Weights ``W`` and ``W'`` of shape ``[out, in]``, float32.
    rows
        Input rows ``[tokens, in]``, or None.
    energy
        :func:`output_energy` of ``W`` on these rows, where it is known.

    Returns
    -------
    The relative squared output error, or None without rows or with an all-zero output.
    """
    if rows is None:
        return None
    rows = rows.to(before.device)
    if energy is None:
        energy = output_energy(before, rows)
    error = (rows @ (after - before).t()).square().sum(dtype=torch.float64)
    return float(error) / energy if energy > 0 else None
