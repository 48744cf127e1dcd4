"""Which blocks a model would miss least: rankings by several metrics, on several sets.

After arXiv 2407.16286. Distances are those of the depth pruning methods, measured in one pass over
the dense model; ``logit`` and ``loss`` leave out one block at a time. What is ranked by a metric on
a set is what a run of that method on that set would rank. No items of tasks are judged: ranking by
those of a test split would leak them into the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lm_calib_plugin import engine, registry
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.checks import check_whole, vocab_size
from lm_calib_plugin.comparison.rankings import tau_between
from lm_calib_plugin.diagnostics.sensitivity.options import LOGIT, LOSS, METRICS
from lm_calib_plugin.engine.batches import Chunk, make_chunks, token_budget
from lm_calib_plugin.engine.depth import DepthPass
from lm_calib_plugin.engine.structure import check_separable
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.placement import execution_device

# The method that ranks by a distance.
_METHODS = {name: f"depth_{name}" for name in METRICS if name not in (LOGIT, LOSS)}
# Numbers of all logits of the sequences that are looked at together: 256 MiB in float32.
_LOGITS = 2**26


@dataclass(frozen=True)
class Ranking:
    """Importance of every part by one metric on one set; the lowest would go first.

    ``cosine``: 1 - cos of input and output, ``l1`` and ``l2``: relative size of what is added
    (means over tokens); ``logit``: mean 2-norm of the change of the logits without the part;
    ``loss``: how much the loss rises without it, nats.
    """

    metric: str
    text: str
    draw: int
    values: tuple[float, ...]

    @property
    def order(self) -> list[int]:
        """Numbers of the parts, the least important first; of ties the earlier one."""
        return sorted(range(len(self.values)), key=lambda i: (self.values[i], i))

    @property
    def ranks(self) -> list[int]:
        """The place of every part in :attr:`order`, 1 for what would go first."""
        places = {part: place + 1 for place, part in enumerate(self.order)}
        return [places[i] for i in range(len(self.values))]


@dataclass(frozen=True)
class DepthResult:
    """All rankings; ``parts`` are the names of what is ranked, ``unit`` their kind."""

    unit: str
    parts: list[str]
    rankings: list[Ranking]

    def tau(self, first: Ranking, second: Ranking) -> float:
        """Return Kendall's tau-b of two rankings; NaN where one has equal values only."""
        return kendall(first.values, second.values)

    def plain(self) -> dict[str, Any]:
        """Return plain values: importances, ranks, and tau of every two rankings."""
        values = np.array([ranking.values for ranking in self.rankings]).T
        return {
            "unit": self.unit,
            "parts": self.parts,
            "rankings": [
                {
                    "metric": r.metric,
                    "text": r.text,
                    "draw": r.draw,
                    "values": list(r.values),
                    "ranks": r.ranks,
                }
                for r in self.rankings
            ],
            "tau": tau_between(values).tolist(),
        }


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's tau-b of two lists of values, NaN where all of one are equal."""
    return float(tau_between(np.array([first, second]).T)[0, 1])


def probe_depth(
    model: Any,
    sets: Sequence[tuple[str, int, CalibrationSet]],
    *,
    unit: str = "block",
    metrics: Sequence[str] | None = None,
    block_path: str | None = None,
    progress: bool = True,
) -> DepthResult:
    """Rank the blocks of a model, or their attention or MLP; it is left as found.

    Parameters
    ----------
    sets
        Name of the text, number of the draw, and what was drawn.
    unit, metrics
        As for :class:`~lm_calib_plugin.diagnostics.sensitivity.options.SensitivityOptions`.

    Raises
    ------
    UserError
        For models of one block, and those whose parts can not be missed.
    """
    blocks = engine.find_blocks(model, block_path)
    check_whole(model, "pretrained", "leaving out blocks one at a time")
    check_separable(model, blocks)
    if len(blocks) < 2:
        raise UserError("model", "has one block", "two or more can be ranked")
    metrics = metrics or METRICS
    rankings: list[Ranking] = []
    names: list[str] = []
    with left_as_found(model):
        for text, draw, calibration in sets:
            work = _RankingPass.of(model, blocks, calibration, unit, progress)
            names = [work.name(i) for i in range(len(blocks))]
            found = work.values(metrics)
            rankings += [Ranking(m, text, draw, tuple(found[m])) for m in metrics]
    return DepthResult(unit, names, rankings)


class _RankingPass(DepthPass):
    """Ranks by several metrics, each from a start of its own at the first block."""

    @classmethod
    def of(
        cls,
        model: Any,
        blocks: engine.Blocks,
        calibration: CalibrationSet,
        unit: str,
        progress: bool,
    ) -> _RankingPass:
        """Return the pass on a set, its hidden states at the first block."""
        device = execution_device(model.get_input_embeddings())
        length = max(len(ids) for ids in calibration.sequences)
        room = _LOGITS // (vocab_size(model) * length)
        size = max(1, min(token_budget(device, length), room))
        chunks = make_chunks(calibration.sequences, (), size, 0, weights=calibration.weights)
        work = cls(model, blocks, chunks, device, unit, progress)
        work.begin()
        return work

    def values(self, metrics: Sequence[str]) -> dict[str, list[float]]:
        """Return the importance of every part by each metric."""
        found: dict[str, list[float]] = {}
        fresh = True
        for metric in metrics:
            if metric in (LOGIT, LOSS):
                continue
            if not fresh:
                self.again()
            method = registry.find_method(_METHODS[metric]).make({})
            found[metric], fresh = self.distances(method.distance), False
        if {LOGIT, LOSS} & set(metrics):
            if not fresh:
                self.again()
            found[LOGIT], found[LOSS] = self.removals()
        return {metric: found[metric] for metric in metrics}

    def removals(self) -> tuple[list[float], list[float]]:
        """Return what leaving out each part does to logits and loss.

        Per part: the mean over tokens of ``||logits - logits without||_2``, and the loss without
        it less that of the whole model. Every sequence passes once, and what follows a part is run
        again from the part's input.
        """
        depth = len(self.blocks)
        logits, losses = [0.0] * depth, [0.0] * depth
        rows = targets = 0.0
        for chunk in self.chunks:
            chunk.done = False

        def rest() -> None:
            nonlocal rows, targets
            for chunk in [c for c in self.chunks if not c.done]:
                found = self._without_each(chunk)
                for i, (moved, rise) in enumerate(found.parts):
                    logits[i] += moved
                    losses[i] += rise
                rows, targets = rows + found.rows, targets + found.targets
                chunk.done = True

        self.until_it_fits(rest)
        return (
            [self._finite(i, total / max(rows, 1.0)) for i, total in enumerate(logits)],
            [self._finite(i, total / max(targets, 1.0)) for i, total in enumerate(losses)],
        )

    def _without_each(self, chunk: Chunk) -> _Sums:
        depth = len(self.blocks)
        hidden = chunk.hidden
        assert hidden is not None
        for index in range(depth):
            hidden = self.output(index, chunk, hidden)
        whole = _Sums.of(chunk, [self._logits(chunk, hidden, row) for row in range(chunk.rows)])
        hidden = chunk.hidden
        assert hidden is not None
        for index in self._bar("leaving out"):
            branch = self.output(index, chunk, hidden, gone=True)
            for later in range(index + 1, depth):
                branch = self.output(later, chunk, branch)
            rows = (self._logits(chunk, branch, row) for row in range(chunk.rows))
            whole.add(chunk, rows)
            hidden = self.output(index, chunk, hidden)
        return whole

    def _logits(self, chunk: Chunk, hidden: Tensor, row: int) -> Tensor:
        """Return float32 logits of one sequence without its pads, ``[length, vocabulary]``."""
        length = length_of(chunk, row)
        ids = chunk.ids[row : row + 1, :length]
        alone = hidden[row : row + 1, :length]
        return self.recorder.logits(Chunk(ids, None, False), alone)[0].float()


class _Sums:
    """Logits of the whole model for a chunk, and sums of how far those without a part are."""

    def __init__(self, whole: list[Tensor], losses: list[float], rows: float, targets: float):
        self.whole, self.losses, self.rows, self.targets = whole, losses, rows, targets
        self.parts: list[tuple[float, float]] = []

    @classmethod
    def of(cls, chunk: Chunk, whole: list[Tensor]) -> _Sums:
        """Start with the logits of the whole model."""
        weights = [_weight(chunk, row) for row in range(chunk.rows)]
        rows = sum(w * one.shape[0] for w, one in zip(weights, whole, strict=True))
        targets = sum(w * (one.shape[0] - 1) for w, one in zip(weights, whole, strict=True))
        losses = [_loss(chunk, row, logits) for row, logits in enumerate(whole)]
        return cls(whole, losses, rows, targets)

    def add(self, chunk: Chunk, without: Any) -> None:
        """Add a part, by the logits of each sequence without it."""
        moved = rise = 0.0
        for row, logits in enumerate(without):
            weight = _weight(chunk, row)
            gap = torch.linalg.vector_norm(self.whole[row] - logits, dim=-1)
            moved += weight * float(gap.double().sum())
            rise += weight * (_loss(chunk, row, logits) - self.losses[row])
        self.parts.append((moved, rise))


def length_of(chunk: Chunk, row: int) -> int:
    """Return the real tokens of a sequence."""
    return chunk.ids.shape[1] if chunk.mask is None else int(chunk.mask[row].sum())


def _weight(chunk: Chunk, row: int) -> float:
    return 1.0 if chunk.weights is None else float(chunk.weights[row])


def _loss(chunk: Chunk, row: int, logits: Tensor) -> float:
    """Return the summed negative log-likelihood of a sequence."""
    targets = chunk.ids[row, 1 : logits.shape[0]].to(logits.device)
    found = functional.cross_entropy(logits[:-1], targets, reduction="none")
    return float(found.double().sum())
