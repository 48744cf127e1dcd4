"""What a layer receives, and how far its compressed output is from its dense one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.engine import TargetLayer
from lm_calib_plugin.quantization.activations import ActivationSpec

# Rows of one chunk that output errors are measured on, drawn at random; inputs are looked at whole.
MEASURED_ROWS = 512


@dataclass
class InputSeen:
    """What was seen of one input, channel by channel; additive, so chunks do not matter.

    ``amax`` is the largest absolute value of each channel (``[in]``), ``square`` the sum of squares
    (``[in]``, float64), ``active`` how many tokens had anything but zero there (``[in]``),
    ``tokens`` how many there were.
    """

    amax: Tensor
    square: Tensor
    active: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, rows: Tensor) -> InputSeen:
        """Look at rows ``[tokens, in]``."""
        width, values = rows.shape[1], rows.float().abs()
        amax = values.amax(0) if len(rows) else values.new_zeros(width)
        square = values.square().sum(0, dtype=torch.float64)
        return cls(amax.cpu(), square.cpu(), (values > 0).sum(0).cpu(), len(rows))

    def add(self, other: InputSeen) -> None:
        """Add what was seen of other tokens."""
        self.amax = torch.maximum(self.amax, other.amax)
        self.square = self.square + other.square
        self.active = self.active + other.active
        self.tokens += other.tokens

    @property
    def mean_square(self) -> Tensor:
        """Mean square of each channel, ``[in]``, float64."""
        return self.square / max(1, self.tokens)


@dataclass
class Measured:
    """One layer on a text; sums over tokens and outputs, from the inputs of the dense model.

    With ``W`` dense, ``W'`` compressed and ``Q`` the rounding of inputs: ``energy`` is
    ``||X W^T||^2``, ``weights`` is ``||X (W' - W)^T||^2``, ``inputs`` is ``||(Q(X) - X) W^T||^2``
    and ``both`` is ``||Q(X) W'^T - X W^T||^2`` (the last two only where inputs are rounded).
    ``beyond`` counts input values that a static range clips, of ``values`` in all. ``seen`` is
    shared by the layers of one input.
    """

    name: str
    seen: InputSeen
    energy: float = 0.0
    weights: float = 0.0
    inputs: float | None = None
    both: float | None = None
    beyond: int = 0
    values: int = 0

    def add(self, other: Measured) -> None:
        """Add the sums over other tokens; what was seen of the input is added elsewhere."""
        self.energy += other.energy
        self.weights += other.weights
        self.beyond += other.beyond
        self.values += other.values
        for name in ("inputs", "both"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs is not None:
                setattr(self, name, (mine or 0.0) + theirs)

    def scale(self, times: float) -> None:
        """Count every row that the sums are over so many times."""
        self.energy *= times
        self.weights *= times
        self.beyond, self.values = round(self.beyond * times), round(self.values * times)
        for name in ("inputs", "both"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name) * times)

    @property
    def error(self) -> float | None:
        """Relative squared output error of the weights alone, as in the report."""
        return self.weights / self.energy if self.energy > 0 else None

    @property
    def total(self) -> float | None:
        """Relative squared output error, with rounded inputs where they are rounded."""
        both = self.weights if self.both is None else self.both
        return both / self.energy if self.energy > 0 else None

    @property
    def of_inputs(self) -> float | None:
        """Relative squared output error by rounding the inputs alone; None where they are not."""
        if self.inputs is None or not self.energy > 0:
            return None
        return self.inputs / self.energy


@dataclass(frozen=True)
class Rounded:
    """How the input of a layer is rounded: levels, and the calibrated range of static ones."""

    spec: ActivationSpec
    limit: float | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """Return rounded rows ``[tokens, in]``, float32."""
        limit = None if self.limit is None else torch.tensor(self.limit, device=rows.device)
        return self.spec.round(rows, limit)


@dataclass
class Listener:
    """Takes the inputs of the layers of one block of the dense model.

    Parameters
    ----------
    groups
        Its layers by shared input.
    twins
        The same layers of the compressed model, by name; layers without one are only looked at.
    rounded
        How inputs are rounded, by name.
    errors
        Whether output errors are measured, or only inputs are looked at.
    """

    groups: Sequence[Sequence[TargetLayer]]
    twins: Mapping[str, TargetLayer]
    rounded: Mapping[str, Rounded] = field(default_factory=dict)
    errors: bool = True
    found: dict[str, Measured] = field(default_factory=dict)

    def __call__(self, number: int, rows: Tensor, _owners: Tensor) -> None:
        """Take rows ``[tokens, in]`` of a group."""
        seen = InputSeen.of(rows)
        sample, times = _sample(rows)
        for layer in self.groups[number]:
            measured = Measured(layer.name, seen)
            twin = self.twins.get(layer.name)
            if self.errors and twin is not None and twin.shape == layer.shape:
                _measure(measured, layer, twin, sample, self.rounded.get(layer.name))
                measured.scale(times)
            self.found[layer.name] = measured


def _sample(rows: Tensor) -> tuple[Tensor, float]:
    """Return some rows in float32, and for how many each stands, so that no chunk counts more.

    At random: every so many rows would be first tokens too often, where lengths are even.
    """
    if len(rows) <= MEASURED_ROWS:
        return rows.float(), 1.0
    generator = torch.Generator().manual_seed(derive_seed("layers", "rows", len(rows)))
    chosen = torch.randperm(len(rows), generator=generator)[:MEASURED_ROWS].sort().values
    return rows[chosen.to(rows.device)].float(), len(rows) / MEASURED_ROWS


def _measure(
    into: Measured, layer: TargetLayer, twin: TargetLayer, rows: Tensor, rounded: Rounded | None
) -> None:
    dense, compressed = layer.read(), twin.read()
    rows = rows.to(dense.device)
    output = rows @ dense.t()
    into.energy = _energy(output)
    into.weights = _energy(rows @ (compressed - dense).t())
    if rounded is None:
        return
    values = rounded(rows)
    into.inputs = _energy((values - rows) @ dense.t())
    into.both = _energy(values @ compressed.t() - output)
    into.values = rows.numel()
    if rounded.limit is not None:
        into.beyond = int((rows.abs() > rounded.limit).sum())


def _energy(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def merged(parts: Sequence[Mapping[str, Measured]]) -> dict[str, Measured]:
    """Return what was measured on all chunks together; layers of one input share what was seen."""
    found: dict[str, Measured] = {}
    shared: dict[int, InputSeen] = {}
    for part in parts:
        added: set[int] = set()
        for name, one in part.items():
            if name not in found:
                own = shared.setdefault(id(one.seen), dataclasses.replace(one.seen))
                found[name] = dataclasses.replace(one, seen=own)
                added.add(id(own))
                continue
            if id(found[name].seen) not in added:
                found[name].seen.add(one.seen)
                added.add(id(found[name].seen))
            found[name].add(one)
    return found


def rounding_of(method: Any, rows: Sequence[Any], dtypes: Mapping[str, torch.dtype]) -> dict[
    str, Rounded
]:  # fmt: skip
    """Return how the inputs of the layers of a report are rounded, by name.

    Parameters
    ----------
    method
        Of the recipe.
    rows
        Of the report; static ranges stand there.
    dtypes
        Of the layers: a stored range has that of its model.
    """
    spec = method.activations
    if spec is None:
        return {}
    found = {}
    for row in rows:
        limit = row.input_limit
        if limit is not None and row.name in dtypes:
            limit = spec.storable(limit, dtypes[row.name])
        if spec.dynamic or limit is not None:
            found[row.name] = Rounded(spec, None if spec.dynamic else limit)
    return found
