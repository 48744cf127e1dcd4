"""AutoRound: learn which way to round, and how much of each range to keep, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import LayerResult
from lm_calib_plugin.quantization.grids import Grid, GridSpec, IntegerGrid
from lm_calib_plugin.quantization.parts import BlockProblem, BlockRounding, Setting
from lm_calib_plugin.statistics import LayerStats

# The smallest part of a range that is kept, and what stands in where nothing is learned.
LOWEST, NEAREST = 0.5, "rtn"


@dataclass(frozen=True)
class AutoRound(BlockRounding):
    """Rounding learned by the sign of the gradient (Cheng et al., algorithm 1).

    Every weight has an offset ``v`` in [-0.5, 0.5] that is added before rounding, every group
    factors in [0.5, 1] of the two ends of its range (one factor on a symmetric grid). All move by
    ``lr`` in the direction opposite to the sign of the gradient of the mean squared error of the
    block's output; rounding passes gradients as if it did nothing. ``lr`` falls linearly to 0.

    The iterate with the smallest error on the sequences that it was tried on is kept, if it beats
    rounding to nearest on all calibration sequences.

    Notes
    -----
    The range factors start from the grid that the grid rule has fitted. Scales take part as they
    are stored, in the dtype of the model. The authors' code lets the factors go down to 0.

    Parameters
    ----------
    iters
        Steps; 0: round to nearest.
    batch
        Sequences drawn for each step.
    lr
        First step length; 0: ``1 / iters``.
    seed
        Of the draws.
    """

    iters: int = 200
    batch: int = 8
    lr: float = 0.0
    seed: int = 0

    paper: ClassVar[str] = "https://arxiv.org/abs/2309.05516"

    def __post_init__(self) -> None:
        self.at_least("iters", 0)
        self.at_least("batch", 1)
        self.at_least("lr", 0)
        self.at_least("seed", 0)

    def check(self, spec: GridSpec) -> None:
        """Refuse grids that are no integer grids."""
        if spec.number != "int":
            raise UserError(
                self.stage,
                f"autoround learns offsets of integer levels, and {spec.number} has none",
                "integers",
                "for instance bits=4, or rounding=gptq",
            )

    def round(
        self, weight: Tensor, grid: Grid, stats: LayerStats | None, setting: Setting
    ) -> LayerResult:
        """Round a weight outside the blocks to nearest, and say so."""
        note = "outside the decoder blocks: rounded to nearest"
        return LayerResult(grid.round(weight), grid=grid, fallback=NEAREST, notes=(note,))

    def round_block(
        self, problem: BlockProblem, grids: Mapping[str, Grid], progress: bool = True
    ) -> dict[str, LayerResult]:
        """Round every layer of a block; every result tells the errors of the block."""
        nearest = {
            name: LayerResult(grids[name].round(weight), grid=grids[name], fallback=NEAREST)
            for name, weight in problem.weights.items()
        }
        found = self._learned(problem, grids, progress) if nearest else {}
        if not found:
            return nearest
        before, after = _errors(problem, nearest), _errors(problem, found)
        if not after[0] < before[0]:
            found = nearest
        for result in found.values():
            result.details = _told("learned", after) | _told("nearest", before)
        return found

    def _learned(
        self, problem: BlockProblem, grids: Mapping[str, Grid], progress: bool
    ) -> dict[str, LayerResult]:
        """Return the best iterate; empty when no error was a number."""
        generator = torch.Generator().manual_seed(self.seed)
        layers = {name: _Learner(w, grids[name]) for name, w in problem.weights.items()}
        first = self.lr or 1 / max(1, self.iters)
        smallest = float("inf")
        steps = tqdm(range(self.iters), desc="autoround", leave=False, disable=not progress)
        for step in steps:
            drawn = torch.randperm(problem.sequences, generator=generator)[: self.batch]
            with torch.enable_grad():
                weights = {name: layer.weight() for name, layer in layers.items()}
                loss = problem.loss(weights, sorted(drawn.tolist()))
                free = [x for layer in layers.values() for x in layer.free]
                gradients = torch.autograd.grad(loss, free, allow_unused=True)
            error = float(loss.detach())
            if error < smallest:
                smallest = error
                for layer in layers.values():
                    layer.remember()
            del weights, loss
            length = first * (1 - step / self.iters)
            slopes = iter(gradients)
            for layer in layers.values():
                layer.move([next(slopes) for _ in layer.free], length)
        return {name: layer.result() for name, layer in layers.items() if layer.best is not None}


class _Learner:
    """Offsets and range factors of one layer, and its best iterate."""

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        if not isinstance(grid, IntegerGrid) or not grid.has_zero:
            raise ValueError("autoround needs integer grids")
        self.grid = grid
        self.groups = weight.reshape(weight.shape[0], -1, grid.group_size)
        self.offset = torch.zeros_like(self.groups).requires_grad_()
        ends = 1 if grid.symmetric else 2
        self.factors = [torch.ones_like(grid.scale).requires_grad_() for _ in range(ends)]
        # Level numbers from the lowest one on, scales, zero points.
        self.best: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def free(self) -> list[Tensor]:
        """What is learned."""
        return [self.offset, *self.factors]

    def weight(self) -> Tensor:
        """Return the rounded weight ``[out, in]``, differentiable in what is learned."""
        scale, zero = self._range()
        level = self._levels(scale, zero)
        rounded = (level - zero[..., None]) * scale[..., None]
        return rounded.reshape(rounded.shape[0], -1)

    def move(self, slopes: list[Tensor | None], length: float) -> None:
        """Go against the signs of the slopes."""
        with torch.no_grad():
            for value, slope in zip(self.free, slopes, strict=True):
                if slope is not None:
                    value.sub_(slope.sign(), alpha=length)
            self.offset.clamp_(-0.5, 0.5)
            for factor in self.factors:
                factor.clamp_(LOWEST, 1)

    def remember(self) -> None:
        """Keep the present iterate: levels take one byte each, offsets would take four."""
        with torch.no_grad():
            scale, zero = self._range()
            levels = (self._levels(scale, zero) - self.grid.lowest).to(torch.uint8)
        self.best = levels, scale, zero

    def result(self) -> LayerResult:
        """Return the best iterate with its grid."""
        assert self.best is not None
        levels, scale, zero = self.best
        old = self.grid
        grid = IntegerGrid(old.bits, old.group_size, old.symmetric, scale, zero, old.dtype)
        level = levels.float() + grid.lowest
        weight = (level - zero[..., None]) * scale[..., None]
        return LayerResult(weight.reshape(weight.shape[0], -1), grid=grid)

    def _range(self) -> tuple[Tensor, Tensor]:
        grid = self.grid
        if grid.symmetric:
            return self._stored(grid.scale * self.factors[0]), grid.zero
        below = grid.zero * grid.scale * self.factors[0]
        above = (grid.highest - grid.zero) * grid.scale * self.factors[1]
        scale = self._stored((below + above) / grid.highest)
        return scale, _rounded(below / scale).clamp(0, grid.highest)

    def _stored(self, scale: Tensor) -> Tensor:
        info = torch.finfo(self.grid.dtype)
        stored = scale.to(self.grid.dtype).float().clamp(min=info.smallest_normal * info.eps)
        return scale + (stored - scale).detach()

    def _levels(self, scale: Tensor, zero: Tensor) -> Tensor:
        level = _rounded(self.groups / scale[..., None] + self.offset) + zero[..., None]
        return level.clamp(self.grid.lowest, self.grid.highest)


def _rounded(x: Tensor) -> Tensor:
    """Round; gradients pass as if nothing had happened."""
    return x + (x.round() - x).detach()


def _errors(
    problem: BlockProblem, results: Mapping[str, LayerResult]
) -> tuple[float, float | None]:
    """Return the errors of a block on all sequences, and on those held out, if any."""
    weights = {name: result.weight for name, result in results.items()}
    with torch.no_grad():
        used = float(problem.loss(weights, range(problem.sequences)))
        if not problem.heldout:
            return used, None
        return used, float(problem.loss(weights, range(problem.heldout), heldout=True))


def _told(which: str, errors: tuple[float, float | None]) -> dict[str, float]:
    """Return the errors of a block, on the sequences used and held out, by name."""
    used, out = errors
    found = {f"block_error_{which}": used}
    return found if out is None else {**found, f"block_error_{which}_heldout": out}
