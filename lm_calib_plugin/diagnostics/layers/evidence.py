"""What is known of each layer: its row of the report, and what was measured on texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_calib_plugin.diagnostics.layers.measuring import Measured
from lm_calib_plugin.report import LayerRow

CALIBRATION, HELDOUT, TEXT = "calibration", "heldout", "text"
_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Layer:
    """One layer, as far as it is known.

    ``text`` and ``calibration`` are what was measured on the text and on the calibration set with
    the inputs of the dense model; None where nothing was.
    """

    row: LayerRow
    text: Measured | None = None
    calibration: Measured | None = None

    @property
    def name(self) -> str:
        """Its name in the model."""
        return self.row.name

    @property
    def block(self) -> int | None:
        """Number of its block; None outside of all."""
        found = _NUMBER.search(self.name)
        return None if found is None else int(found[1])

    @property
    def kind(self) -> str:
        """What it is in every block: ``q``, ``down``, ``expert gate_up``..."""
        last = self.name.rsplit(".", 1)[-1].removesuffix("_proj")
        return f"expert {last}" if ".experts." in self.name else last

    @property
    def errors(self) -> dict[str, float | None]:
        """Relative squared output errors by what they were measured on.

        Those of the report are measured with what the layer received while the model was
        compressed; that on the text with what the dense model gives it, inputs rounded where the
        compressed model rounds them.
        """
        return {
            CALIBRATION: self.row.error_calibration,
            HELDOUT: self.row.error_heldout,
            TEXT: None if self.text is None else self.text.total,
        }

    def over_fit(self) -> dict[str, float]:
        """Return how many times larger the error is on other data than on calibration data.

        ``heldout``: held out sequences against used ones, both of the report. ``text``: the text
        against the calibration set, the weights alone, both with the inputs of the dense model
        (errors of the report were measured with other inputs, and perhaps on other text).
        """
        found: dict[str, float] = {}
        for name, other, base in (
            (HELDOUT, self.row.error_heldout, self.row.error_calibration),
            (TEXT, _of(self.text), _of(self.calibration)),
        ):
            if other is not None and base is not None and base > 0:
                found[name] = other / base
        return found


def _of(measured: Measured | None) -> float | None:
    return None if measured is None else measured.error


def gathered(
    rows: Sequence[LayerRow],
    text: Mapping[str, Measured] | None = None,
    calibration: Mapping[str, Measured] | None = None,
) -> list[Layer]:
    """Return the layers of a report with what was measured of them."""
    return [Layer(r, (text or {}).get(r.name), (calibration or {}).get(r.name)) for r in rows]


def basis_of(layers: Sequence[Layer]) -> str:
    """Return what errors of layers are compared on: what most are known on.

    Among equals the text comes first, then what was held out, then the calibration set.
    """
    order = (TEXT, HELDOUT, CALIBRATION)
    known = {name: sum(x.errors[name] is not None for x in layers) for name in order}
    return max(order, key=lambda name: (known[name], -order.index(name)))


@dataclass(frozen=True)
class Weights:
    """A dense and a compressed weight, ``[out, in]`` float32, and what one asks of them.

    ``group_size`` is the number of inputs that share a scale (-1: all), ``bits`` the width of
    their levels, None where weights are not quantized.
    """

    dense: Tensor
    compressed: Tensor
    group_size: int = -1
    bits: int | None = None

    def error_by_input(self, mean_square: Tensor) -> Tensor:
        """Return the error energy of each input channel alone, ``[in]``, float64.

        ``E[x_j^2] ||W'_j - W_j||^2``: products of different channels are left out, so that shares
        are those of channels that do not hang together.
        """
        change = (self.compressed - self.dense).double().cpu()
        return change.square().sum(0) * mean_square

    def error_by_group(self, mean_square: Tensor) -> Tensor:
        """Return the same by group of weights that share a scale, ``[out, groups]``, float64."""
        change = (self.compressed - self.dense).double().cpu().square() * mean_square
        return self._grouped(change).sum(-1)

    def peaks(self) -> Tensor:
        """Return the largest weight of each group over the root mean square of the others.

        ``[out, groups]``; the largest is left out of the mean, which it would hide itself in.
        """
        groups = self._grouped(self.dense.double().cpu().abs())
        largest = groups.amax(-1)
        rest = groups.square().sum(-1) - largest.square()
        rms = (rest.clamp(min=0) / max(1, groups.shape[-1] - 1)).sqrt()
        return torch.where(rms > 0, largest / rms, torch.ones_like(largest))

    def emptied(self) -> Tensor:
        """Return which input channels lost all of their weights, ``[in]`` bool."""
        compressed, dense = self.compressed.cpu(), self.dense.cpu()
        return (compressed == 0).all(0) & (dense != 0).any(0)

    def _grouped(self, values: Tensor) -> Tensor:
        width = values.shape[1]
        size = self.group_size
        if size <= 0 or width % size:
            size = width
        return values.reshape(values.shape[0], width // size, size)
