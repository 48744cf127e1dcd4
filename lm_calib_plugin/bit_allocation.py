"""``bits=auto:B``: a width for every layer, by the error on sequences held out, under a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lm_calib_plugin import engine
from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.errors import CalibError, UserError, named
from lm_calib_plugin.quantization.pipeline import Quantizer
from lm_calib_plugin.statistics import STATISTICS, Gram, LayerStats, output_error, statistic_of

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Choice:
    """What one layer costs, and loses, at every width.

    ``costs`` are stored bits with scales and zero points, ``errors`` relative squared output errors
    on sequences held out; one entry a width.
    """

    name: str
    size: int
    costs: tuple[float, ...]
    errors: tuple[float, ...]


def choose_widths(choices: Sequence[Choice], budget: float) -> list[int]:
    """Return the place of the width of each layer: smallest sum of errors within the budget.

    An exact solution (mixed-integer linear program): one width a layer, all stored bits together
    at most ``budget`` times the number of weights.

    Raises
    ------
    UserError
        When even the smallest widths need more.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    weights = sum(choice.size for choice in choices)
    lowest = sum(min(choice.costs) for choice in choices) / weights
    if lowest > budget:
        raise UserError(
            "bits",
            f"got auto:{budget:g}, but {min(WIDTHS)} bits in every layer need {lowest:.4g} bits a "
            "weight with scales and zero points",
            f"auto:B with B >= {lowest:.4g}, or a larger group_size",
            f"for instance bits=auto:{np.ceil(lowest * 4 + 1) / 4:g}",
        )
    count = len(WIDTHS)
    total = len(choices) * count
    one_each = csr_array(
        (np.ones(total), (np.repeat(np.arange(len(choices)), count), np.arange(total)))
    )
    costs = np.array([c for choice in choices for c in choice.costs]) / weights
    found = milp(
        np.array([e for choice in choices for e in choice.errors]),
        integrality=np.ones(total),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(costs[None, :], ub=budget * (1 + 1e-12)),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise CalibError(f"bits=auto:{budget:g}: no solution found ({found.message}).")
    return [int(row.argmax()) for row in np.asarray(found.x).reshape(-1, count)]


def allocate_bits(
    model: nn.Module,
    blocks: engine.Blocks,
    chunks: list[Chunk],
    layers: Sequence[TargetLayer],
    method: Quantizer,
    budget: float,
    device: torch.device,
    progress: bool = True,
) -> dict[str, int]:
    """Return the width of every layer.

    Every layer is rounded at every width as the method does it, on what the dense model gives it
    (without its transform, and to nearest where the method rounds whole blocks), and judged by the
    sequences held out. One forward pass; statistics of one block at a time.
    """
    visitor = _Judge(method, progress)
    inside = [layer for layer in layers if layer.block != engine.HEAD]
    if len(inside) < len(layers):
        raise UserError(
            "targets",
            "the output head is among the layers of bits=auto, which looks at decoder blocks only",
            fix="give the head a width of its own (overrides), or leave it out",
        )
    engine.dense_pass(model, blocks, chunks, inside, visitor, device, progress, "widths")
    choices = [visitor.found[layer.name] for layer in inside]
    places = choose_widths(choices, budget)
    return {c.name: WIDTHS[p] for c, p in zip(choices, places, strict=True)}


@dataclass
class _Judge:
    """Rounds the layers of each block at every width, and keeps costs and errors."""

    method: Quantizer
    progress: bool
    found: dict[str, Choice] = field(default_factory=dict)

    def wants(self, index: int) -> bool:
        return True

    def start(self, index: int, groups: Sequence[Sequence[TargetLayer]]) -> list[Any]:
        kind = statistic_of((self.method.statistic, "gram"))
        made = []
        for group in groups:
            width, device = group[0].shape[1], group[0].parameter.device
            stats = STATISTICS[kind].empty(width, device)
            stats.heldout = STATISTICS[kind].empty(width, device)
            made.append(stats)
        return made

    def listen(self, state: Any, chunk: Chunk, number: int, rows: Tensor, owners: Tensor) -> None:
        stats = state[number].heldout if chunk.heldout else state[number]
        weights = None if chunk.weights is None else chunk.weights[owners]
        stats.update(rows, weights, owners)

    def finish(self, index: int, groups: Sequence[Sequence[TargetLayer]], state: Any) -> None:
        for group, stats in zip(groups, state, strict=True):
            for layer in group:
                self.found[layer.name] = self._judged(layer, stats)

    def _judged(self, layer: TargetLayer, stats: LayerStats) -> Choice:
        weight, dtype = layer.read(), layer.parameter.dtype
        judge = stats.heldout if stats.heldout is not None and stats.heldout.tokens else stats
        assert isinstance(judge, Gram)
        size = output_error(weight, judge.gram()) or 1.0
        costs, errors = [], []
        for bits in WIDTHS:
            own = dataclasses.replace(self.method, bits=bits, transform=None).for_layer(layer.name)
            with named(layer.name):
                if own.block_rounding is None:
                    result = own.compress(weight, stats, dtype)
                    rounded, grid = result.weight, result.grid
                else:
                    grid = own.fit_grid(weight, stats, dtype)
                    rounded = grid.round(weight)
            costs.append(grid.stored_bits(layer.shape))
            errors.append(output_error(rounded - weight, judge.gram()) / size)
        return Choice(layer.name, weight.numel(), tuple(costs), tuple(errors))
