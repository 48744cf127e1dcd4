"""What was packed, what was not and why, how fast, and how far from the simulated model."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Race:
    """Seconds of the dense layer and of a kernel on the same input (medians)."""

    dense: float
    packed: float

    @property
    def ratio(self) -> float:
        """How many times faster the kernel is."""
        return self.dense / self.packed


@dataclass(frozen=True)
class LayerExecution:
    """How one layer is executed.

    Parameters
    ----------
    name
        Of the layer in the model.
    kernel
        Of the packed layer; None: it stays dense, that is simulated.
    reason, detail
        Why it stays dense: in words that many layers share, and with this layer's numbers.
    race, alone
        Kernel against the dense layer with the evaluation's number of tokens, and with one. Of the
        best kernel tried; None where none ran.
    error
        Relative difference from the simulated layer's output, in the Frobenius norm.
    bytes_before, bytes_after
        Of the weight in memory.
    """

    name: str
    kernel: str | None = None
    reason: str = ""
    detail: str = ""
    race: Race | None = None
    alone: Race | None = None
    error: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0

    def row(self) -> dict[str, Any]:
        """Return plain values for the per-layer table."""
        return {
            "kernel": self.kernel,
            "reason": "; ".join(part for part in (self.reason, self.detail) if part),
            "speed_ratio": None if self.race is None else round(self.race.ratio, 3),
            "speed_ratio_one_token": None if self.alone is None else round(self.alone.ratio, 3),
            "error": self.error,
            "weight_bytes_before": self.bytes_before,
            "weight_bytes_after": self.bytes_after,
        }


@dataclass(frozen=True)
class ExecutionReport:
    """How the layers of a model are executed.

    Parameters
    ----------
    device
        In words.
    tokens
        With how many tokens at once kernels were timed.
    layers
        In the order of the model.
    notes
        Other things worth a warning.
    """

    device: str
    tokens: int
    layers: Sequence[LayerExecution]
    notes: Sequence[str] = field(default=())

    @property
    def packed(self) -> list[LayerExecution]:
        """The layers that run on a kernel."""
        return [layer for layer in self.layers if layer.kernel is not None]

    @property
    def dense(self) -> list[LayerExecution]:
        """The layers that stay dense."""
        return [layer for layer in self.layers if layer.kernel is None]

    @property
    def reasons(self) -> dict[str, int]:
        """Why layers stay dense, and how many, the most frequent first."""
        found = collections.Counter(layer.reason for layer in self.dense)
        return dict(found.most_common())

    @property
    def error(self) -> float:
        """The largest relative error of a packed layer."""
        return max((layer.error or 0.0 for layer in self.packed), default=0.0)

    @property
    def speed_ratio(self) -> float | None:
        """Seconds of all dense layers over those of the layers as they are executed now.

        Over the layers that were timed, one call each, with the evaluation's number of tokens.
        """
        timed = [layer for layer in self.layers if layer.race is not None]
        before = sum(layer.race.dense for layer in timed if layer.race)
        after = sum(
            layer.race.packed if layer.kernel else layer.race.dense for layer in timed if layer.race
        )
        return before / after if after else None

    @property
    def warnings(self) -> list[str]:
        """One sentence if a layer stays dense; a louder one if all do."""
        found = list(self.notes)
        if not self.dense:
            return found
        why = "; ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        if not self.packed:
            return [
                f"execution=packed packed none of {len(self.layers)} layers, so the model is "
                f"executed as with execution=simulated ({why}). Type execution=simulated, or see "
                f"the layer table for what each layer lacks",
                *found,
            ]
        return [
            f"execution=packed: {len(self.dense)} of {len(self.layers)} layers stay dense "
            f"(simulated): {why}",
            *found,
        ]

    def summary(self) -> dict[str, Any]:
        """Return totals as plain values."""
        kernels = collections.Counter(layer.kernel for layer in self.packed)
        ratio = self.speed_ratio
        return {
            "execution": "packed" if self.packed else "simulated",
            "device": self.device,
            "tokens_timed": self.tokens,
            "layers_packed": len(self.packed),
            "layers_dense": len(self.dense),
            "kernels": dict(kernels),
            "dense_reasons": self.reasons,
            "weight_bytes_before": sum(layer.bytes_before for layer in self.layers),
            "weight_bytes_after": sum(layer.bytes_after for layer in self.layers),
            "largest_error": self.error,
            "linear_speed_ratio": None if ratio is None else round(ratio, 3),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "warnings": self.warnings,
        }

    def table(self) -> dict[str, dict[str, Any]]:
        """Return plain values per layer."""
        return {layer.name: layer.row() for layer in self.layers}
