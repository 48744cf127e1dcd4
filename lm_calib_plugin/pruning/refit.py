"""Masked conjugate gradients: the best values of the kept weights, all rows at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_calib_plugin.pruning.descent import check_fallen, row_errors

# Rows that have stopped leave the work when so many of the rest have.
STOPPED = 0.25


@dataclass(frozen=True)
class Refit:
    """What a re-fit found.

    ``weight`` is ``[out, in]``, zero off the mask. ``steps`` is the number of steps that the
    slowest row took, ``residual`` the length of the gradient on the mask relative to that at the
    start, over all rows (0: solved). ``chosen`` is the number of steps after which the held-out
    error was lowest; None without held-out inputs. ``started`` is ``e^T G e`` of every row at the
    start, ``[out]``.
    """

    weight: Tensor
    steps: int
    residual: float
    chosen: int | None
    started: Tensor


@dataclass(frozen=True)
class Metric:
    """Gram matrices on the scale of inputs of unit energy, for all layers that share an input.

    ``scale`` is the root of the diagonal of the Gram matrix (1 where that is zero), ``[in]``;
    ``gram`` and ``heldout``, divided by it on both sides, are ``[in, in]``, ``heldout`` that of
    other inputs, if there are any.
    """

    scale: Tensor
    gram: Tensor
    heldout: Tensor | None

    @classmethod
    def of(cls, gram: Tensor, heldout: Tensor | None = None) -> Metric:
        """Scale Gram matrices ``[in, in]``."""
        diagonal = gram.diagonal()
        scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
        pairs = scale[:, None] * scale
        return cls(scale, gram / pairs, None if heldout is None else heldout / pairs)


def masked_pcg(
    weight: Tensor,
    keep: Tensor,
    gram: Tensor,
    steps: int,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    heldout: Tensor | None = None,
    every: int = 5,
) -> Refit:
    """Lower ``tr((W - V) G (W - V)^T)`` over all ``V`` that are zero off the mask.

    Conjugate gradients on ``G`` scaled to unit diagonal (which is Jacobi preconditioning), with one
    product of ``[out, in]`` and ``[in, in]`` a step. Rows are separate problems with their own step
    sizes, and stop by themselves. Weights of inputs without energy stay as they are.

    Parameters
    ----------
    weight
        Dense weight ``W``, ``[out, in]``.
    keep
        Mask of the weights that stay, ``[out, in]``.
    gram
        Gram matrix of the inputs, ``[in, in]``, of the dtype of ``weight``; a ridge is added
        before, see :func:`~lm_calib_plugin.pruning.shrinkage.shrunk`.
    steps
        At most so many steps.
    start
        Values to begin with, ``[out, in]``; None: the dense ones.
    tolerance
        A row stops when a step lowers its error by less than this part of it.
    heldout
        Gram matrix of other inputs, ``[in, in]``; the iterate with the lowest error on them, over
        all rows, is returned; the start is one of them.
    every
        Steps between two looks at the held-out error; a look costs as much as a step.

    Returns
    -------
    Refit
        Never worse than the start on ``gram``, nor on ``heldout``, up to rounding.
    """
    metric = Metric.of(gram, heldout)
    return refitted(weight, keep, metric, steps, start, tolerance, every)


def refitted(
    weight: Tensor,
    keep: Tensor,
    metric: Metric,
    steps: int,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    every: int = 5,
    check: bool = True,
) -> Refit:
    """Do what :func:`masked_pcg` does, with matrices that are scaled already.

    ``check=False``: whoever calls will compute the error of the result anyway, and compare it with
    ``started`` (:func:`~lm_calib_plugin.pruning.descent.check_fallen`).
    """
    values = torch.where(keep, weight if start is None else start, torch.zeros_like(weight))
    scale = metric.scale
    solver = _Solver((weight - values) * scale, keep, metric.gram)
    judge = None if metric.heldout is None else _Judge(metric.heldout, solver)
    taken, going = 0, True
    while going and taken < steps:
        going = solver.step(tolerance)
        taken += 1
        if judge is not None and (taken % every == 0 or taken == steps or not going):
            going = judge.look(solver, taken) and going
    error = solver.all_errors() if judge is None else judge.error
    if check:
        check_fallen(solver.start, error, solver.gram, "re-fit")
    found = torch.where(keep, weight - error / scale, torch.zeros_like(weight))
    # Where nothing moved, no rounding either.
    found = torch.where(error == solver.first, values, found)
    chosen = None if judge is None else judge.chosen
    return Refit(found, taken, solver.remaining(), chosen, solver.start)


class _Solver:
    """Conjugate gradients on the scaled error ``E = (W - V) D``, each row with its own steps.

    ``rows`` are the places of the rows still at work; ``error``, ``gradient`` and ``direction``
    hold those only, ``[rows, in]``, ``value`` their ``e^T G e``, ``square`` the square of their
    gradient on the mask, ``[rows]``.
    """

    def __init__(self, error: Tensor, keep: Tensor, gram: Tensor) -> None:
        self.first, self.gram = error, gram
        residual = error @ gram
        self.start = (error * residual).sum(1)
        self.mask = keep.to(error.dtype)
        self.gradient = residual * self.mask
        self.direction, self.error = self.gradient.clone(), error.clone()
        self.value, self.square = self.start.clone(), self.gradient.square().sum(1)
        self.rows = torch.arange(len(error), device=error.device)
        self.finished, self.squares = error.clone(), self.square.clone()
        self.initial = self.square.sum()

    def step(self, tolerance: float) -> bool:
        """Make one step in every row at work; tell whether a row has still something to gain."""
        if not len(self.rows):
            return False
        curved = (self.direction @ self.gram).mul_(self.mask)
        bend = (self.direction * curved).sum(1)
        size = torch.where(bend > 0, self.square / bend, 0.0)[:, None]
        self.error -= size * self.direction
        self.gradient -= size * curved
        gain = size[:, 0] * self.square
        self.value -= gain
        square = self.gradient.square().sum(1)
        turn = torch.where(self.square > 0, square / self.square, 0.0)[:, None]
        self.direction.mul_(turn).add_(self.gradient)
        self.square = square
        going = gain > tolerance * self.value.clamp_min(0)
        if float(going.float().mean()) <= 1 - STOPPED:
            self._leave(~going)
        return bool(going.any())

    def _leave(self, done: Tensor) -> None:
        """Store the rows that are done and go on with the others."""
        places = self.rows[done]
        self.finished[places], self.squares[places] = self.error[done], self.square[done]
        for name in ("rows", "mask", "error", "gradient", "direction", "value", "square"):
            setattr(self, name, getattr(self, name)[~done])

    def all_errors(self) -> Tensor:
        """Return the present scaled error of all rows, ``[out, in]``."""
        return self.finished.index_copy(0, self.rows, self.error)

    def remaining(self) -> float:
        """Return the length of the gradient on the mask, relative to that at the start."""
        left = self.squares.index_copy(0, self.rows, self.square).sum()
        return float((left / self.initial).sqrt()) if self.initial > 0 else 0.0


class _Judge:
    """Remembers the iterate with the lowest error on held-out inputs, summed over all rows."""

    def __init__(self, gram: Tensor, solver: _Solver) -> None:
        self.gram, self.lowest, self.chosen = gram, float("inf"), 0
        self.of_rows = torch.empty_like(solver.start)
        self.rows = solver.rows
        self.look(solver, 0)

    def look(self, solver: _Solver, taken: int) -> bool:
        """Compare the iterate after ``taken`` steps; tell whether it is the best one so far.

        Rows that had stopped at the last look are what they were.
        """
        error = solver.all_errors()
        own = error if len(self.rows) == len(error) else error[self.rows]
        self.of_rows[self.rows] = row_errors(own, self.gram)
        self.rows = solver.rows
        found = float(self.of_rows.sum())
        better = found < self.lowest
        if better:
            self.error, self.lowest, self.chosen = error, found, taken
        return better
