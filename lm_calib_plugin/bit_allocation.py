"""``bits=auto:B``: a width for every layer, by the error on sequences held out, under a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lm_calib_plugin import engine
from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.capture import replay
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.engine.passes import BlockPass
from lm_calib_plugin.engine.rows import rows as rows_of
from lm_calib_plugin.errors import CalibError, NumericalError, UserError, named
from lm_calib_plugin.joint import quantizer_of
from lm_calib_plugin.method import Method
from lm_calib_plugin.quantization.pipeline import Quantizer
from lm_calib_plugin.statistics import STATISTICS, LayerStats
from lm_calib_plugin.values import DENSE_BITS

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
# The largest error, as the solver sees it.
SPAN = 1e6


@dataclass(frozen=True)
class Choice:
    """What one layer costs, and loses, at every width.

    ``costs`` are stored bits with scales and zero points, ``errors`` mean squared changes of the
    output of its block, relative to each token, on sequences held out; one entry a width.
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
    _check_lowest(sum(min(choice.costs) for choice in choices) / weights, budget)
    count = len(WIDTHS)
    total = len(choices) * count
    one_each = csr_array(
        (np.ones(total), (np.repeat(np.arange(len(choices)), count), np.arange(total)))
    )
    costs = np.array([c for choice in choices for c in choice.costs]) / weights
    errors = np.array([e for choice in choices for e in choice.errors])
    # The solver stops at an absolute gap of 1e-6, which may be more than all errors together.
    errors = errors * (SPAN / max(float(errors.max()), 1e-300))
    limit = budget * (1 + 1e-12)
    while True:
        found = milp(
            errors,
            integrality=np.ones(total),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(costs[None, :], ub=limit),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None and limit < budget:
            return [int(np.argmin(choice.costs)) for choice in choices]
        if found.x is None:
            raise CalibError(f"bits=auto:{budget:g}: no solution found ({found.message}).")
        places = [int(row.argmax()) for row in np.asarray(found.x).reshape(-1, count)]
        used = sum(choice.costs[place] for choice, place in zip(choices, places, strict=True))
        if used <= budget * weights * (1 + 1e-9):
            return places
        # The solver lets a constraint be broken by as much as 1e-6.
        limit -= 2e-6


def check_budget(
    layers: Sequence[TargetLayer],
    method: Method,
    treated: Mapping[str, Method],
    budget: float,
) -> None:
    """Refuse a budget that the smallest widths do not meet, before any work.

    Layers with options of their own (``treated``, by name) count with what they take.

    Raises
    ------
    UserError
        With the smallest budget that can be met, and for an output head without a width.
    """
    free = [layer for layer in layers if layer.name not in treated]
    if any(layer.block == engine.HEAD for layer in free):
        raise UserError(
            "targets",
            "the output head is among the layers of bits=auto, which looks at decoder blocks only",
            fix="give the head a width of its own (overrides), or leave it out",
        )
    if not free:
        raise UserError(
            "overrides",
            "no layer is left for bits=auto to choose a width for",
            "patterns that leave some out",
            "drop a pattern, or give bits as a number",
        )
    least = sum(_stored(layer, quantizer_of(method), min(WIDTHS)) for layer in free)
    least += sum(_stored(x, quantizer_of(treated[x.name])) for x in layers if x.name in treated)
    _check_lowest(least / sum(_size(layer) for layer in layers), budget)


def _check_lowest(lowest: float, budget: float) -> None:
    if lowest > budget:
        raise UserError(
            "bits",
            f"got auto:{budget:g}, but {min(WIDTHS)} bits in every layer need {lowest:.4g} bits a "
            "weight, with scales and zero points and what overrides take",
            f"auto:B with B >= {lowest:.4g}, or a larger group_size",
            f"for instance bits=auto:{np.ceil(lowest * 4 + 1) / 4:g}",
        )


def _size(layer: TargetLayer) -> int:
    return layer.shape[0] * layer.shape[1]


def _stored(layer: TargetLayer, quantizer: Quantizer | None, bits: int | None = None) -> float:
    """Return the bits that a layer takes on integer levels, scales and zero points counted."""
    assert quantizer is not None
    width = 8 * layer.parameter.element_size()
    bits = quantizer.bits if bits is None else bits
    if bits == DENSE_BITS:
        return float(_size(layer) * width)
    group = layer.shape[1] if quantizer.group_size == -1 else quantizer.group_size
    assert quantizer.rounding is not None
    zero = 0 if quantizer.symmetric else width if quantizer.rounding.real_zeros else bits
    return float(_size(layer) * bits + _size(layer) // group * (width + zero))


def allocate_bits(
    model: nn.Module,
    blocks: engine.Blocks,
    chunks: list[Chunk],
    layers: Sequence[TargetLayer],
    method: Quantizer,
    treated: Mapping[str, Quantizer],
    budget: float,
    device: torch.device,
    progress: bool = True,
) -> dict[str, int]:
    """Return the width of every layer that has none of its own.

    Every layer is rounded at every width as the method does it, on what the dense model gives it
    (without its transform, and to nearest where the method rounds whole blocks); what that alone
    does to the output of its block is measured on the sequences held out. Costs one forward pass,
    and for every layer and width one of the sequences held out through the block. Layers with
    options of their own (``treated``, by name) take their part of the budget.
    """
    free = [layer for layer in layers if layer.name not in treated]
    taken = sum(_stored(x, treated[x.name]) for x in layers if x.name in treated)
    rest = budget * sum(map(_size, layers)) - taken
    choices = _Trials(model, blocks, chunks, device).run(free, method, progress)
    places = choose_widths(choices, rest / sum(map(_size, free)))
    return {c.name: WIDTHS[p] for c, p in zip(choices, places, strict=True)}


class _Trials(BlockPass):
    """Rounds one layer after the other at every width, and puts it back."""

    def run(self, layers: Sequence[TargetLayer], method: Quantizer, progress: bool) -> list[Choice]:
        by_block: dict[int, list[TargetLayer]] = {}
        for layer in layers:
            by_block.setdefault(layer.block, []).append(layer)
        self.capture()
        found: list[Choice] = []
        last = max(by_block)
        for index in tqdm(range(last + 1), desc="widths", disable=not progress):
            # Every trial is taken back, so that nothing changes.
            with self.at_hand(index):
                if index in by_block:
                    found += self._block(index, by_block[index], method)
                if index < last:
                    self.propagate(index)
        return found

    def _block(self, index: int, layers: Sequence[TargetLayer], method: Quantizer) -> list[Choice]:
        stats = self._statistics(index, layers, method.statistic, method.uses_heldout)
        outputs = self._outputs(index)
        return [
            self._tried(index, layer, stats.get(id(layer)), method, outputs) for layer in layers
        ]

    def _statistics(
        self, index: int, layers: Sequence[TargetLayer], kind: str, heldout: bool
    ) -> dict[int, LayerStats]:
        if kind == "none":
            return {}
        groups = self.groups(index, layers)

        def start() -> list[LayerStats]:
            made = []
            for group in groups.groups:
                place = group[0].shape[1], group[0].device
                made.append(STATISTICS[kind].empty(*place))
                made[-1].heldout = STATISTICS[kind].empty(*place) if heldout else None
            return made

        def listen(state: Any, chunk: Chunk, number: int, rows: Tensor, owners: Tensor) -> None:
            stats = state[number].heldout if chunk.heldout else state[number]
            if stats is not None:
                weights = chunk.weights_of(owners)
                stats.update(rows, weights, owners)

        state = self.observe(index, groups, start, listen, keep=False)
        return {
            id(layer): one
            for group, one in zip(groups.groups, state, strict=True)
            for layer in group
        }

    def _outputs(self, index: int) -> list[Tensor]:
        """Return what the block makes of the sequences held out, rows ``[tokens, hidden]``."""
        block = self.blocks.modules[index]

        def once() -> list[Tensor]:
            made = []
            for chunk in self.chunks:
                if chunk.heldout:
                    assert chunk.hidden is not None
                    made.append(rows_of(chunk, replay(block, chunk.calls[index], chunk.hidden)))
            return made

        found: list[Tensor] = self.until_it_fits(once)
        return found

    def _tried(
        self,
        index: int,
        layer: TargetLayer,
        stats: LayerStats | None,
        method: Quantizer,
        outputs: Sequence[Tensor],
    ) -> Choice:
        weight, stored = layer.read(), layer.stored.clone()
        costs, errors = [], []
        for bits in WIDTHS:
            own = dataclasses.replace(method, bits=bits, transform=None).for_layer(layer.name)
            with named(layer.name):
                if own.block_rounding is None:
                    result = own.compress(weight, stats, layer.parameter.dtype)
                    rounded, grid = result.weight, result.grid
                else:
                    grid = own.fit_grid(weight, stats, layer.parameter.dtype)
                    rounded = grid.round(weight)
            try:
                layer.write(rounded)
                errors.append(_difference(self._outputs(index), outputs))
            finally:
                layer.stored.copy_(stored)
            if not np.isfinite(errors[-1]):
                raise NumericalError(
                    layer.name,
                    f"trial of {bits} bits",
                    "NaN or Inf in the output of the block",
                    "try dtype=float32 or bfloat16",
                )
            costs.append(grid.stored_bits(layer.shape))
        return Choice(layer.name, weight.numel(), tuple(costs), tuple(errors))


def _difference(found: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Return the squared difference relative to each token's own size, averaged over tokens.

    The norm of the next block divides by that size, so that tokens of huge activations do not
    count for more than others.
    """
    if len(found) != len(outputs):
        # Memory ran short in between: the same rows, in smaller chunks.
        found, outputs = [torch.cat(list(found))], [torch.cat(list(outputs))]
    total, count = 0.0, 0
    for one, dense in zip(found, outputs, strict=True):
        size = dense.double().square().sum(-1)
        total += float(((one - dense).double().square().sum(-1) / size.clamp_min(1e-30)).sum())
        count += size.numel()
    return total / max(1, count)
