"""What a walk over the blocks is asked to do, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.method import Method
from lm_calib_plugin.report import LayerRow
from lm_calib_plugin.statistics import statistic_of


@dataclass(frozen=True)
class Plan:
    """What to do: one method on a list of layers.

    ``methods`` holds, by name, the layers that are treated otherwise than the rest.
    ``propagate`` is ``compressed`` or ``dense``: which model's hidden states the next block sees;
    with ``true_sequential`` layers inside a block see compressed ones before them, too.
    ``inputs`` names what goes through the dense model, to the last bit, so that what is watched of
    it can be shared with other runs; see :mod:`lm_calib_plugin.engine.sharing`. None: it can not.
    """

    method: Method
    layers: Sequence[TargetLayer]
    propagate: str = "compressed"
    methods: Mapping[str, Method] = field(default_factory=dict)
    true_sequential: bool = False
    inputs: str | None = None

    def method_of(self, layer: TargetLayer) -> Method:
        """Return the method as it treats one layer."""
        return self.methods.get(layer.name, self.method).for_layer(layer.name)

    @property
    def statistic(self) -> str:
        """What has to be known of the inputs for all layers; some share an input."""
        kinds = {method.statistic for method in (self.method, *self.methods.values())}
        return kinds.pop() if len(kinds) == 1 else statistic_of(kinds)

    def undivided(self, has_data: bool, shares: bool) -> str:
        """Return why several processes can not divide the work; empty where they can.

        ``shares`` tells that statistics are shared between runs.
        """
        if has_data and any(self.method_of(layer).block_rounding for layer in self.layers):
            return "layers of a block are rounded together, on all of the calibration set"
        return "statistics are shared with other runs of the same process" if shares else ""

    @property
    def uses_heldout(self) -> bool:
        """Whether a layer is judged by the sequences held out."""
        return any(method.uses_heldout for method in (self.method, *self.methods.values()))


@dataclass
class WalkResult:
    """Rows of the report, seconds by stage, warnings, and the grids of quantized layers.

    ``processes`` are the calibration tokens of each of several processes that divided the work.
    ``waited_on_host`` tells whether hidden states were in the memory of the host between blocks.
    """

    rows: list[LayerRow] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    grids: dict[str, Any] = field(default_factory=dict)
    transforms: list[dict[str, Any]] = field(default_factory=list)
    pads: int = 0
    processes: list[int] | None = None
    waited_on_host: bool = False
