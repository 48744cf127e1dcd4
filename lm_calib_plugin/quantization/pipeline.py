"""A quantization method as a point in the grid: transform, grid, rounding, activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.part import Part, make_part, part_text
from lm_calib_plugin.quantization.activations import ActivationSpec
from lm_calib_plugin.quantization.grids import Grid, GridSpec
from lm_calib_plugin.quantization.parts import (
    BlockRounding,
    GridRule,
    Observer,
    Rounding,
    Setting,
    Transform,
)
from lm_calib_plugin.registry import QUANTIZATION_STAGES
from lm_calib_plugin.schemes import SCHEMES, Scheme
from lm_calib_plugin.stages import DEFAULTS, NONE
from lm_calib_plugin.statistics import LayerStats, statistic_of
from lm_calib_plugin.values import DENSE_BITS

AUTO = "auto"


@dataclass(frozen=True)
class Quantizer(Method):
    """Change the model so that it rounds well, fit grids, round weights, and round inputs, too.

    Parameters
    ----------
    scheme
        Name of a scheme whose numbers are not integers, ``FP8`` for instance; None: integers.
    bits
        Width of a level number; 16 leaves the weights as they are.
    group_size
        Consecutive inputs that share a scale; -1 for one scale per output row.
    symmetric
        Whether the grid is symmetric around zero.
    act_bits
        Width of the inputs of every layer, rounded while the model runs; None: as they are.
    act_dynamic
        Whether each token has a range of its own, or all share a calibrated one.
    kv_bits
        Width of cached keys and values; None: as they are.
    damp
        Ridge of the parts that use the Gram matrix, relative to its mean diagonal; None: chosen
        for each layer by the sequences held out.
    act_order, compat
        See :class:`~lm_calib_plugin.quantization.parts.Setting`.
    correction
        Part of the error of earlier blocks that a layer makes up for, 0 to 1.
    transform, grid, rounding, observer
        The parts; a transform of None does nothing.
    """

    kind: ClassVar[str] = "quantization"
    scheme: str | None = None
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_bits: int | None = None
    act_dynamic: bool = True
    kv_bits: int | None = None  # type: ignore[misc]
    damp: float | None = 0.01
    act_order: bool = True
    compat: str | None = None
    correction: float = 0.0  # type: ignore[misc]
    transform: Transform | None = None  # type: ignore[misc]
    grid: GridRule | None = None
    rounding: Rounding | None = None
    observer: Observer | None = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.rounding is None:
            raise ValueError("a quantization method needs a rounding")
        static = self.act_bits is not None and not self.act_dynamic
        for stage in ("grid", *(["observer"] if static else [])):
            if getattr(self, stage) is None:
                object.__setattr__(self, stage, make_part(stage, DEFAULTS[stage]))
        if not self.keeps_weights:
            self.rounding.check(self.spec)
        _ = self.activations  # a kind of number that cannot be calibrated is refused here
        if self.correction and not self.rounding.corrects:
            raise UserError(
                "correction",
                f"got {self.correction:g}",
                "roundings that use the Gram matrix of the inputs",
                "add rounding=gptq, or correction=0",
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make the method from recipe options; stages are texts such as ``awq?steps=10``.

        A scheme gives what is not among the options.
        """
        given = dict(options)
        name = given.pop("scheme", None)
        base = SCHEMES[name] if name else Scheme()
        for option in ("bits", "group_size", "symmetric", "act_bits", "act_dynamic"):
            given.setdefault(option, getattr(base, option))
        if given.get("damp") == AUTO:
            given["damp"] = None
        if str(given["bits"]).startswith(AUTO):
            # Whoever knows all layers chooses; until then the default stands for it.
            given["bits"] = base.bits
        for option in ("act_bits", "kv_bits"):
            given[option] = None if given.get(option) == DENSE_BITS else given.get(option)
        stages = {k: make_part(k, v) for k, v in given.items() if k in QUANTIZATION_STAGES}
        return cls(**{**given, **stages}, scheme=name if base.number != "int" else None)

    # --- what the options say ------------------------------------------------------------------

    @property
    def number(self) -> str:
        """The kind of number of weights and activations."""
        return SCHEMES[self.scheme].number if self.scheme else "int"

    @property
    def spec(self) -> GridSpec:
        """The levels of the weights."""
        return GridSpec(self.number, self.bits, self.group_size, self.symmetric)

    @property
    def activations(self) -> ActivationSpec | None:  # type: ignore[override]
        """The levels of the inputs of the layers, None where they stay as they are."""
        if self.act_bits is None:
            return None
        return ActivationSpec(self.number, self.act_bits, self.act_dynamic)

    @property
    def setting(self) -> Setting:
        """Options that roundings share."""
        return Setting(self.damp, self.act_order, self.compat)

    @property
    def keeps_weights(self) -> bool:
        """Whether every weight stays what it is (16 bits)."""
        return self.bits == DENSE_BITS

    @property
    def does_nothing(self) -> bool:
        """Whether nothing at all is changed."""
        changes = (self.transform, self.act_bits, self.kv_bits)
        return self.keeps_weights and all(change is None for change in changes)

    @property
    def block_rounding(self) -> BlockRounding | None:  # type: ignore[override]
        """The rounding, when it treats all layers of a block together."""
        found = isinstance(self.rounding, BlockRounding) and not self.keeps_weights
        return self.rounding if found else None  # type: ignore[return-value]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that do something, in order."""
        of_weights = () if self.keeps_weights else (self.grid, self.rounding)
        static = self.act_bits is not None and not self.act_dynamic
        found = (self.transform, *of_weights, self.observer if static else None)
        return tuple(part for part in found if part is not None)

    def options(self) -> dict[str, Any]:
        """Return every option that matters, stages as texts with their defaults filled in."""
        plain: dict[str, Any] = {"scheme": self.scheme} if self.scheme else {}
        plain |= {"bits": self.bits}
        if not self.keeps_weights:
            plain |= {"group_size": self.group_size, "symmetric": self.symmetric}
        if self.act_bits is not None:
            plain |= {"act_bits": self.act_bits, "act_dynamic": self.act_dynamic}
        if self.kv_bits is not None:
            plain["kv_bits"] = self.kv_bits
        if any(part.uses_damp for part in self.parts):
            plain["damp"] = AUTO if self.damp is None else self.damp
        if any(getattr(part, "uses_order", False) for part in self.parts):
            plain |= {"act_order": self.act_order, "compat": self.compat}
        if self.correction and not self.keeps_weights:
            plain["correction"] = self.correction
        working = {part.stage: part for part in self.parts}
        return plain | {k: part_text(k, v) for k, v in working.items()}

    @property
    def label(self) -> str:
        """The names of the parts, such as ``awq+rtn``."""
        shown = [part for part in (self.transform, self.rounding) if part is not None]
        return "+".join(part_text(p.stage, p).partition("?")[0] for p in shown)

    # --- what the parts say together -------------------------------------------------------------

    @property
    def statistic(self) -> str:  # type: ignore[override]
        """What has to be known of the inputs for all parts that look at weights."""
        return statistic_of(part.statistic for part in self.parts if part is not self.observer)

    @property
    def rows_independent(self) -> bool:  # type: ignore[override]
        """Whether no stage lets an output row depend on the others."""
        # All scales of nvfp4 share one factor.
        alone = self.transform is None and self.number != "nvfp4"
        return alone and all(
            part.rows_independent for part in self.parts if part is not self.observer
        )

    @property
    def permutation_safe(self) -> bool:  # type: ignore[override]
        """Whether permuting output rows permutes the result."""
        assert self.rounding is not None
        return self.transform is None and self.rounding.permutation_safe

    @property
    def uses_heldout(self) -> bool:  # type: ignore[override]
        """Whether a part looks at the statistics of sequences held out."""
        auto = self.damp is None and any(part.uses_damp for part in self.parts)
        return auto or any(part.uses_heldout for part in self.parts)

    @property
    def revision(self) -> str:  # type: ignore[override]
        """Revisions of the parts, in order."""
        return ".".join(str(part.revision) for part in self.parts)

    # --- work ------------------------------------------------------------------------------------

    def check_layer(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a layer whose width does not hold whole groups."""
        width = shape[1]
        if self.keeps_weights or self.group_size == -1 or width % self.group_size == 0:
            if self.activations is not None:
                self.activations.check_width(name, width)
            return
        fitting = [g for g in (256, 128, 96, 64, 48, 32, 16, 8) if width % g == 0]
        if self.scheme and SCHEMES[self.scheme].fixed:
            raise UserError(
                "scheme",
                f"{self.scheme} has groups of {self.group_size}, which do not divide the {width} "
                f"inputs of layer {name}",
                f"widths that are multiples of {self.group_size}",
                f"ignore={name.rsplit('.', 1)[-1]}",
            )
        raise UserError(
            "group_size",
            f"{self.group_size} does not divide the {width} inputs of layer {name}",
            f"for this layer: {', '.join(map(str, [*fitting, -1]))}",
            f"for instance group_size={fitting[0] if fitting else -1}",
        )

    def for_layer(self, name: str) -> Self:
        """Return the method without a search for ranges that leaves this layer out."""
        assert self.grid is not None
        if self.grid.applies_to(name):
            return self
        return replace(self, grid=make_part("grid", DEFAULTS["grid"]))

    def fit_grid(self, weight: Tensor, stats: LayerStats | None, dtype: torch.dtype) -> Grid:
        """Return the grid of one weight ``[out, in]``, scales as ``dtype`` stores them."""
        assert self.grid is not None
        return self.grid.fit(weight, self.spec, stats, dtype)

    def rounded_to_nearest(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight ``[out, in]`` on a min-max grid of its own; 16 bits: as it is."""
        return weight if self.keeps_weights else self.spec.fit(weight, dtype).round(weight)

    def compress(
        self, weight: Tensor, stats: LayerStats | None, dtype: torch.dtype = torch.float32
    ) -> LayerResult:
        """Round one weight ``[out, in]``."""
        return self.compress_together([weight], stats, dtype)[0]

    def compress_together(
        self,
        weights: Sequence[Tensor],
        stats: LayerStats | None,
        dtype: torch.dtype = torch.float32,
    ) -> list[LayerResult]:
        """Round weights that share an input; the rounding factors its Gram matrix once."""
        assert self.rounding is not None
        if self.keeps_weights:
            return [LayerResult(weight.clone()) for weight in weights]
        for part in self.parts:
            if part is not self.observer and part.statistic != NONE and stats is None:
                raise ValueError(f"{type(part).__name__} needs statistics of the inputs")
        ready = [self.rounding.prepared(w.contiguous(), stats, self.setting) for w in weights]
        grids = [self.fit_grid(weight, stats, dtype) for weight in ready]
        return self.rounding.round_together(ready, grids, stats, self.setting)
