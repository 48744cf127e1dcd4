"""The one shape of a statistic: empty, update, merge."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self


class LayerStats(ABC):
    """Additive statistics of the inputs of one layer.

    Statistics of a union of token sets are the merge of the statistics of the parts, so chunking,
    data parallelism and mixing are one operation. ``tokens`` counts the input rows seen. With no
    row at all, a statistic stands for uncorrelated inputs of equal energy (the identity), which
    turns every data-driven method into its data-free relative.

    Class attributes
    ----------------
    numbers
        Attributes that are plain numbers, and add up when statistics are merged.
    peaks
        Attributes that are tensors of which the larger value counts; all others add up.
    """

    numbers: ClassVar[tuple[str, ...]] = ("tokens",)
    peaks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.in_features = in_features
        self.device = torch.device(device)
        self.tokens = 0
        # The same statistic of sequences kept out, for methods that stop by it.
        self.heldout: Self | None = None

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> Self:
        """Return a statistic that has seen nothing."""
        return cls(in_features, device)

    def update(
        self, x: Tensor, weights: Tensor | None = None, owners: Tensor | None = None
    ) -> None:
        """Add input rows ``x`` of shape ``[tokens, in]``, any float dtype.

        ``weights`` says how often each row counts (once), ``owners`` to which sequence it belongs;
        both ``[tokens]``. Only statistics that know of sequences look at ``owners``.
        """
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"expected [tokens, {self.in_features}], got {tuple(x.shape)}")
        if x.shape[0]:
            self._add(self._read(x.detach(), weights))
            self.tokens += x.shape[0]

    def _read(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Return rows as they are added: on the device, in float32, each with its weight."""
        rows = x.to(self.device, torch.float32)
        if weights is not None:
            # Squares and products of a row are linear in its weight.
            rows = rows * weights.to(rows).sqrt()[:, None]
        return rows

    def merge(self, other: Self) -> None:
        """Add everything that ``other`` has seen; ``other`` is left as it is."""
        if type(other) is not type(self) or other.in_features != self.in_features:
            raise ValueError("only statistics of one kind and one width can be merged")
        self._join(other)
        self.tokens += other.tokens

    def leaves(self) -> Iterator[LayerStats]:
        """Yield the statistic and all that it holds, down to that of sequences held out."""
        yield self
        for value in vars(self).values():
            if isinstance(value, LayerStats):
                yield from value.leaves()

    def live(self) -> Iterator[tuple[Tensor, bool]]:
        """Yield the tensors that make up the statistic itself, and whether the larger one counts.

        To merge elsewhere what :meth:`merge` merges here: the tensors of one statistic are to be
        added to (or, where the flag is set, compared with) those of the others, in place.
        """
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                yield value, name in self.peaks

    def borrow(self, other: Self, share: float) -> None:
        """Add ``share`` times what ``other`` has seen; ``other`` is left as it is."""
        self.merge(other.scaled(share))

    def scaled(self, factor: float) -> Self:
        """Return the statistic as if every row had counted ``factor`` times."""
        made = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(made, name, value * factor)
            elif isinstance(value, LayerStats):
                setattr(made, name, value.scaled(factor))
            elif isinstance(value, float):
                setattr(made, name, value * factor)
        made.tokens = round(self.tokens * factor)
        return made

    def divided(self, factors: Tensor) -> Self:
        """Return the statistic of the inputs divided by ``factors``, channel by channel.

        ``factors`` are positive, ``[in]``. An unseen input stays unseen.

        Raises
        ------
        ValueError
            For statistics that do not tell that of divided inputs.
        """
        if factors.shape != (self.in_features,):
            raise ValueError(f"expected [{self.in_features}], got {tuple(factors.shape)}")
        made = copy.copy(self)
        made._divide(factors.to(self.device))
        made.heldout = None if self.heldout is None else self.heldout.divided(factors)
        return made

    def _divide(self, factors: Tensor) -> None:
        """Divide what is kept; in new tensors, since the old ones are shared."""
        raise ValueError(f"the statistic {type(self).__name__} of rescaled inputs is not known")

    @abstractmethod
    def _add(self, x: Tensor) -> None: ...

    @abstractmethod
    def _join(self, other: Self) -> None: ...

    @abstractmethod
    def is_finite(self) -> bool:
        """Tell whether nothing seen so far was NaN or infinite."""
        ...

    @abstractmethod
    def energy(self) -> Tensor:
        """Return ``sum_t x_tj^2`` per input channel, shape ``[in]``, float32; ones if unseen."""
        ...
