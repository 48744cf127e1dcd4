"""What every compression method looks like: one float32 weight in, one out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lm_calib_plugin.statistics import LayerStats


@dataclass
class LayerResult:
    """The compressed weight of one layer.

    ``weight`` is ``[out, in]`` in float32. ``grid`` is the quantization grid the weight lies on,
    None after pruning. ``damp`` is the ridge used, None where there was none. ``bias`` is added to
    the bias of the layer, ``[out]``. ``fallback`` names what was done instead of the method,
    ``details`` are numbers for the report.
    """

    weight: Tensor
    grid: Any = None
    damp: float | None = None
    bias: Tensor | None = None
    fallback: str | None = None
    details: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())


class Method(ABC):
    """A compression method: a dataclass whose fields are its options.

    A method sees one weight matrix and the statistics of its input; layers, devices, files and
    progress live elsewhere. It never changes its arguments.

    Class attributes
    ----------------
    kind
        ``pruning`` or ``quantization``.
    statistic
        ``none``, ``moments``, ``gram``, ``spread`` or ``gram+spread``: what has to be known of the
        inputs.
    permutation_safe
        Whether permuting output rows permutes the result the same way.
    rows_independent
        Whether the result of an output row does not depend on the other rows.
    elementwise
        Whether what happens to a weight depends on the input statistics of its own channel only by
        products of whole tensors, so that moments may differ from row to row, ``[out, in]``.
    scope
        ``layer``: sees one weight at a time; ``model``: takes whole parts out of the model.
    needs_bias
        Whether layers without a bias have to be refused.
    uses_heldout
        Whether the statistics are to come with those of the sequences held out.
    correction
        Part of the error of earlier blocks that a layer makes up for, 0 to 1; an option of the
        methods that use the Gram matrix.
    transform
        What changes the model without changing what it computes, before weights are looked at.
    block_rounding
        What rounds all layers of a block together, in place of :meth:`compress`.
    activations, observer
        How inputs of layers are rounded while the model runs, and how ranges are calibrated.
    kv_bits
        Width to which cached keys and values are rounded; None: not at all.
    inert
        Options taken for the sake of uniform commands, without any effect on this method.
    revision
        Raised whenever the method's results change; part of the recipe key.
    paper
        Link to the source of the method.
    """

    kind: ClassVar[str]
    scope: ClassVar[str] = "layer"
    statistic: ClassVar[str] = "none"
    permutation_safe: ClassVar[bool] = False
    rows_independent: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    inert: ClassVar[tuple[str, ...]] = ()
    needs_bias: ClassVar[bool] = False
    uses_heldout: ClassVar[bool] = False
    correction: ClassVar[float] = 0.0
    transform: ClassVar[Any] = None
    block_rounding: ClassVar[Any] = None
    activations: ClassVar[Any] = None
    observer: ClassVar[Any] = None
    kv_bits: ClassVar[int | None] = None
    revision: ClassVar[int | str] = 1
    paper: ClassVar[str] = ""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make the method from recipe options; options not given keep their default."""
        return cls(**options)

    def options(self) -> dict[str, Any]:
        """Return every option with its value, defaults filled in, as plain values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def identity(self) -> dict[str, Any]:
        """Return the options as they enter the recipe key: equal whenever the result is."""
        return self.options()

    @property
    def label(self) -> str:
        """A short name for progress bars and tables."""
        return type(self).__name__.lower()

    @property
    def does_nothing(self) -> bool:
        """Whether these options leave every weight exactly as it is."""
        return False

    @property
    def keeps_weights(self) -> bool:
        """Whether these options leave the weights as they are, whatever else is changed."""
        return self.does_nothing

    def check_layer(self, name: str, shape: tuple[int, int]) -> None:
        """Raise a :class:`~lm_calib_plugin.errors.UserError` if a layer can not be treated.

        ``shape`` is ``(out, in)``. Called for all layers before any data is read.
        """
        return None

    def for_layer(self, name: str) -> Self:
        """Return the method as it treats the layer of this name, ``model.layers.0.mlp.up_proj``."""
        return self

    @abstractmethod
    def compress(
        self, weight: Tensor, stats: LayerStats | None, dtype: torch.dtype = torch.float32
    ) -> LayerResult:
        """Compress one weight.

        Parameters
        ----------
        weight
            ``[out, in]``, float32; not changed.
        stats
            Statistics of the layer's input of the kind ``statistic``; not changed.
        dtype
            The dtype in which the model keeps the weight; what a method stores beside the integer
            levels (scales) is rounded to it.
        """
        ...

    def compress_together(
        self,
        weights: Sequence[Tensor],
        stats: LayerStats | None,
        dtype: torch.dtype = torch.float32,
    ) -> list[LayerResult]:
        """Compress layers that share an input; the results are those of one after the other.

        ``weights`` are ``[out, in]`` each, with one ``in``; the rest is that of :meth:`compress`.
        Methods that treat output rows by themselves may do all layers in one go.
        """
        return [self.compress(weight, stats, dtype) for weight in weights]
