"""Pruning and quantization of one weight together: the mask first, then levels on what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.pruning.pipeline import Pipeline
from lm_calib_plugin.quantization.pipeline import Quantizer
from lm_calib_plugin.statistics import LayerStats, statistic_of


@dataclass(frozen=True)
class Joint(Method):
    """A mask of a pruning method, and levels for the weights that it keeps.

    A rounding that lets later columns absorb its error (GPTQ) does the same with the weights that
    are removed: one sweep for both, as in SparseGPT (section 3.5 of arXiv 2301.00774), on the
    final mask. Where the pruning method finds new values in another way (re-fits), those values
    are rounded. Removed weights stay exactly zero, which is a level of every grid used here.

    Parameters
    ----------
    pruning, quantization
        The two methods.
    """

    kind: ClassVar[str] = "joint"
    pruning: Pipeline
    quantization: Quantizer

    def __post_init__(self) -> None:
        rounding = self.quantization.rounding
        assert rounding is not None
        if not self.quantization.keeps_weights and not rounding.keeps_zeros:
            raise UserError(
                "method",
                f"`{self.quantization.label}` does not leave removed weights at zero",
                "roundings that leave zeros alone: rtn, gptq, gptq_heldout",
                "for instance method=sparsegpt+gptq",
            )
        try:
            _ = self.statistic
        except ValueError:
            raise UserError(
                "method",
                f"`{self.pruning.label}` needs the spread of the inputs, "
                f"`{self.quantization.label}` their ranges",
                "one of the two",
                "leave out the transform, or prune with wanda or sparsegpt",
            ) from None

    def options(self) -> dict[str, Any]:
        """Return the options of both, without those in which their own defaults differ.

        What is left out was not given: a value that is given holds for both.
        """
        mine, other = self.pruning.options(), self.quantization.options()
        return {k: v for k, v in {**mine, **other}.items() if mine.get(k, v) == v}

    def identity(self) -> dict[str, Any]:
        """Return the options of both, as they enter the key; of one, where the other is idle."""
        if self.pruning.does_nothing:
            return self.quantization.identity()
        if self.quantization.does_nothing:
            return self.pruning.identity()
        return {"pruning": self.pruning.identity(), "quantization": self.quantization.identity()}

    @property
    def label(self) -> str:
        """The labels of both."""
        return f"{self.pruning.label}, {self.quantization.label}"

    @property
    def damp(self) -> float | None:
        """The ridge that was asked for, the larger of both; None where one is to be chosen."""
        own, other = self.quantization.damp, self.pruning.damp
        if own is None or not any(part.uses_damp for part in self.pruning.parts):
            return own
        return max(own, other)

    @property
    def statistic(self) -> str:  # type: ignore[override]
        """What has to be known of the inputs for both."""
        return statistic_of((self.pruning.statistic, self.quantization.statistic))

    @property
    def rows_independent(self) -> bool:  # type: ignore[override]
        """Whether no stage lets an output row depend on the others."""
        return self.pruning.rows_independent and self.quantization.rows_independent

    @property
    def permutation_safe(self) -> bool:  # type: ignore[override]
        """Whether permuting output rows permutes the result."""
        return self.pruning.permutation_safe and self.quantization.permutation_safe

    @property
    def needs_bias(self) -> bool:  # type: ignore[override]
        """Whether a part writes into the bias of a layer."""
        return self.pruning.needs_bias

    @property
    def uses_heldout(self) -> bool:  # type: ignore[override]
        """Whether a part looks at the statistics of sequences held out."""
        return self.pruning.uses_heldout or self.quantization.uses_heldout

    @property
    def correction(self) -> float:  # type: ignore[override]
        """Part of the error of earlier blocks that a layer makes up for."""
        return max(self.pruning.correction, self.quantization.correction)

    @property
    def inert(self) -> tuple[str, ...]:  # type: ignore[override]
        """Options without effect on both."""
        return tuple(o for o in self.pruning.inert if o in self.quantization.inert)

    @property
    def revision(self) -> str:  # type: ignore[override]
        """Revisions of both; of one, where the other is idle."""
        if self.pruning.does_nothing:
            return self.quantization.revision
        if self.quantization.does_nothing:
            return self.pruning.revision
        return f"{self.pruning.revision}+{self.quantization.revision}"

    @property
    def transform(self) -> Any:  # type: ignore[override]
        """What changes the model before weights are looked at."""
        return self.quantization.transform

    @property
    def activations(self) -> Any:  # type: ignore[override]
        """How inputs of layers are rounded while the model runs."""
        return self.quantization.activations

    @property
    def observer(self) -> Any:  # type: ignore[override]
        """How ranges of inputs are calibrated."""
        return self.quantization.observer

    @property
    def kv_bits(self) -> int | None:
        """Width of cached keys and values."""
        return self.quantization.kv_bits

    @property
    def keeps_weights(self) -> bool:
        """Whether no weight is changed."""
        return self.pruning.does_nothing and self.quantization.keeps_weights

    @property
    def does_nothing(self) -> bool:
        """Whether nothing at all is changed."""
        return self.pruning.does_nothing and self.quantization.does_nothing

    def check_layer(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a layer that one of the two can not treat."""
        self.pruning.check_layer(name, shape)
        self.quantization.check_layer(name, shape)

    def for_layer(self, name: str) -> Self:
        """Return the method as both treat this layer."""
        return replace(
            self,
            pruning=self.pruning.for_layer(name),
            quantization=self.quantization.for_layer(name),
        )

    def rounded_to_nearest(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight on a grid of its own; see :class:`Quantizer`."""
        return self.quantization.rounded_to_nearest(weight, dtype)

    def compress(
        self, weight: Tensor, stats: LayerStats | None, dtype: torch.dtype = torch.float32
    ) -> LayerResult:
        """Prune one weight ``[out, in]``, and round what is left."""
        return self.compress_together([weight], stats, dtype)[0]

    def compress_together(
        self,
        weights: Sequence[Tensor],
        stats: LayerStats | None,
        dtype: torch.dtype = torch.float32,
    ) -> list[LayerResult]:
        """Prune weights that share an input together, and round what is left together."""
        if self.pruning.does_nothing:
            return self.quantization.compress_together(weights, stats, dtype)
        pruned = self.pruning.compress_together(weights, stats, dtype)
        if self.quantization.keeps_weights:
            return pruned
        keeps = [one.weight != 0 for one in pruned]
        update, rounding = self.pruning.update, self.quantization.rounding
        assert rounding is not None
        # The values that a sweep over the mask gives come out of the joint sweep, too.
        swept = rounding.corrects and (update is None or update.sweeps)
        setting = self.quantization.setting
        starts = [
            rounding.prepared(weight if swept else one.weight, stats, setting)
            for weight, one in zip(weights, pruned, strict=True)
        ]
        grids = [self.quantization.fit_grid(one.weight, stats, dtype) for one in pruned]
        found = rounding.round_together(starts, grids, stats, setting, keeps)
        return [_joined(one, other) for one, other in zip(pruned, found, strict=True)]


def _joined(pruned: LayerResult, found: LayerResult) -> LayerResult:
    """Return the rounded weight with what pruning says of it."""
    ridges = [damp for damp in (pruned.damp, found.damp) if damp is not None]
    return replace(
        found,
        bias=pruned.bias,
        damp=max(ridges, default=None),
        notes=pruned.notes + found.notes,
    )


def pruning_of(method: Method) -> Pipeline | None:
    """Return the pipeline that prunes, of a pruning or a joint method."""
    found = method.pruning if isinstance(method, Joint) else method
    return found if isinstance(found, Pipeline) else None


def quantizer_of(method: Method) -> Quantizer | None:
    """Return what quantizes, of a quantization or a joint method."""
    found = method.quantization if isinstance(method, Joint) else method
    return found if isinstance(found, Quantizer) else None


def with_part(method: Method, part: Pipeline | Quantizer) -> Method:
    """Return the method with another pipeline, or another quantizer, in its place."""
    if not isinstance(method, Joint):
        return part
    name = "pruning" if isinstance(part, Pipeline) else "quantization"
    return replace(method, **{name: part})
