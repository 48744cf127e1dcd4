"""What is remembered of one distinct input of a block, while it is watched."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.dealing import Dealt
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.engine.plan import Plan
from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.statistics import SINGLE, STATISTICS, Component, LayerStats, TokenSample
from lm_calib_plugin.statistics.sample import output_energy

# Most rows that errors are measured on.
ERROR_TOKENS = 512
# Where copies wait.
HOST = torch.device("cpu")


class Energies:
    """Energies of the outputs of dense layers on samples of an input, each computed once.

    Parameters
    ----------
    used, heldout
        Samples, which nobody changes.
    """

    def __init__(self, used: TokenSample, heldout: TokenSample) -> None:
        self._samples = used, heldout
        self._known: dict[tuple[str, bool], float | None] = {}

    def of(self, name: str, weight: Tensor, heldout: bool) -> float | None:
        """Return that of the layer of a name and its dense weight; None without any row."""
        key = name, heldout
        if key not in self._known:
            rows = self._samples[heldout].rows()
            self._known[key] = None if rows is None else output_energy(weight, rows)
        return self._known[key]


@dataclass
class Watched:
    """Statistics and samples of one input.

    ``cross`` is ``X^T (Y - X)``, ``[in, in]``, where ``Y`` are the inputs in the dense model, and
    ``shift`` what follows from it for the weights of all layers that share the input. ``others``
    is what is watched for other runs, and no concern of this one. ``energies`` knows how large the
    outputs of the dense layers are on the samples, where runs share that. ``owner`` is the process
    that solves these layers.
    """

    stats: LayerStats | None
    used: TokenSample
    heldout: TokenSample
    finite: bool = True
    cross: Tensor | None = None
    shift: Tensor | None = None
    others: dict[Component, LayerStats] = field(default_factory=dict)
    energies: Energies | None = None
    owner: int = 0

    def check(self, name: str, complete: bool) -> None:
        """Refuse inputs of the layer ``name`` that are no numbers.

        ``complete`` tells that the statistics are those of all processes.
        """
        known = self.stats is None or not complete or self.stats.is_finite()
        if not (self.finite and known):
            raise NumericalError(
                name,
                "calibration input",
                "NaN or Inf in the activations",
                "try dtype=float32 or bfloat16",
            )

    def forget(self) -> None:
        """Let go of everything: another process needs it."""
        self.stats = self.cross = None
        for sample in (self.used, self.heldout):
            sample.replace(torch.zeros(0, 0), 0)

    def divide(self, by: Tensor) -> None:
        """Turn everything into what would have been seen of inputs divided by ``by``, ``[in]``."""
        if self.stats is not None:
            kept = self.stats.heldout
            self.stats = self.stats.divided(by)
            self.stats.heldout = None if kept is None else kept.divided(by)
        self.used, self.heldout = self.used.divided(by), self.heldout.divided(by)
        if self.cross is not None:
            self.cross = self.cross / by[:, None] / by[None, :]


def nothing(
    layer: TargetLayer,
    plan: Plan,
    dealt: Dealt,
    corrected: bool,
    wanted: Sequence[Component] = (),
) -> Watched:
    """Return what is known of the input of a layer before the first chunk of a process.

    ``corrected`` tells whether its inputs in the dense model are looked at, too; ``wanted`` is what
    else is watched, for other runs.
    """
    kind = plan.statistic
    width, device = layer.shape[1], layer.device
    stats = None
    if kind != "none":
        stats = STATISTICS[kind].empty(width, device)
        if plan.uses_heldout:
            stats.heldout = STATISTICS[kind].empty(width, device)
    counts, starts = dealt.total, dealt.before
    if layer.expert is not None:
        # Two experts a token is usual; a busier expert keeps more rows than the limit.
        share = max(1, layer.parameter.shape[0] // 2)
        # How many tokens earlier processes send to an expert is not known.
        counts, starts = (-(-counts[0] // share), -(-counts[1] // share)), (0, 0)
    cross = None
    if corrected:
        cross = torch.zeros(width, width, dtype=torch.float32, device=device)
    used, out = (
        TokenSample(count, ERROR_TOKENS, start) for count, start in zip(counts, starts, strict=True)
    )
    others = {part: SINGLE[part[0]].empty(width, device) for part in wanted}
    return Watched(stats, used, out, cross=cross, others=others)


def listen(
    watched: Sequence[Watched], chunk: Chunk, number: int, received: Tensor, owners: Tensor
) -> None:
    """Add input rows ``[tokens, in]`` of a chunk to input ``number``."""
    seen = watched[number]
    if chunk.heldout or seen.stats is None:
        seen.finite = seen.finite and bool(received.isfinite().all())
    weights = chunk.weights_of(owners)
    for (_, heldout), stats in seen.others.items():
        if heldout == chunk.heldout:
            stats.update(received, weights, owners)
    if chunk.heldout:
        seen.heldout.update(received)
        if seen.stats is not None and seen.stats.heldout is not None:
            seen.stats.heldout.update(received, weights, owners)
        return
    seen.used.update(received)
    if seen.stats is not None:
        seen.stats.update(received, weights, owners)


def pair(
    watched: Sequence[Watched], chunk: Chunk, number: int, received: Tensor, dense: Tensor
) -> None:
    """Add what input ``number`` lacks against the dense model, both ``[tokens, in]``."""
    seen = watched[number]
    if seen.cross is None or chunk.heldout:
        return
    received = received.float()
    difference = dense.float() - received
    if chunk.weights is not None:
        difference *= chunk.weights[chunk.owners()].to(difference)[:, None]
    seen.cross.addmm_(received.t(), difference)


def copied(value: Any, device: torch.device) -> Any:
    """Return a copy on a device of what was watched, down to the last tensor.

    Equal bits in the same order of memory. Anything that is no statistic stays as it is.
    """
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, torch.device):
        return device
    if isinstance(value, list):
        return [copied(part, device) for part in value]
    if isinstance(value, dict):
        return {name: copied(part, device) for name, part in value.items()}
    if isinstance(value, (Watched, LayerStats, TokenSample)):
        made = copy.copy(value)
        for name, part in vars(value).items():
            setattr(made, name, copied(part, device))
        return made
    return value


def bytes_of(value: Any) -> int:
    """Return how many bytes the tensors of what was watched take."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, list):
        return sum(map(bytes_of, value))
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    if isinstance(value, (Watched, LayerStats, TokenSample)):
        return bytes_of(vars(value))
    return 0
