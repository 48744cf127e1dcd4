"""What a calibration source is: documents, and where they come from.

A source says *where text comes from*. How text is cut into sequences is the packer's part
(:mod:`lm_calib_plugin.calibration.packers`), how many sequences each source gives is the
recipe's. A third party adds a source by installing a class and an entry point in the group
``lm_calib_plugin.calibration``.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from lm_calib_plugin.calibration.options import Option, read_options
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.expression import SourceTerm
from lm_calib_plugin.registry import Nested
from lm_calib_plugin.runtime import Runtime

Order = Literal["stored", "shuffled"]
# Terms and a number of sequences -> the sequences of these terms, and one record a term.
Draw = Callable[[tuple[SourceTerm, ...], int], tuple[list[list[int]], list[dict[str, Any]]]]


class Document(NamedTuple):
    """A text and its number in the source."""

    number: int
    text: str


@dataclass(frozen=True)
class Context:
    """What a source may need to know to give its documents.

    Parameters
    ----------
    tokenizer
        The tokenizer of the model.
    count, seqlen
        How many sequences are asked of this source, and the most tokens of each.
    seed
        Seed of this term's draw.
    vocab_size
        Rows of the model's embedding table.
    order
        ``stored``: as the source holds them (the packer joins neighbors); ``shuffled``: in an
        order drawn with the seed, every document once.
    windows
        How many sequences the packer would cut from a list of texts, for sources that make text
        until it is enough.
    model
        The dense model, on its device; None when the caller has none.
    model_id
        Digest of its weights, the name under which generated text is kept; empty: not kept.
    runtime
        Progress bars and the like.
    pack
        Name of the packer that will cut the documents.
    draw
        Gives the sequences of other terms, for a source that is made of them: exactly those that
        they would give alone in the place of this source. None when the caller has no such.
    fold
        Part of the documents that will be used; the others are left out after the source. A
        source need not look at it, unless it keeps what it made for ``count`` windows.
    pack_options
        Fields of the recipe that packers read, those that were given.
    chat_template
        Whether documents are written with the chat template, which is done after the source.
    count_of
        The argument that ``count`` comes from, for messages: ``nsamples``, ``pool`` or
        ``select_target``, whose number is fixed.
    """

    tokenizer: Any
    count: int
    seqlen: int
    seed: int
    vocab_size: int
    order: Order = "stored"
    windows: Callable[[Sequence[str]], int] = field(default=len)
    model: Any = None
    model_id: str = ""
    runtime: Runtime = field(default_factory=Runtime)
    pack: str = ""
    draw: Draw | None = None
    fold: str = "all"
    pack_options: Mapping[str, Any] = field(default_factory=dict)
    chat_template: bool = False
    count_of: str = "nsamples"

    @property
    def of_fold(self) -> str:
        """What a message says after a number of documents or texts; nothing without a fold."""
        return "" if self.fold == "all" else f" of fold `{self.fold}`"

    @property
    def cut(self) -> dict[str, Any]:
        """What decides, beside ``pack``, how many windows a text gives; empty by default."""
        chat = {"chat_template": True} if self.chat_template else {}
        return {**self.pack_options, **chat}

    @property
    def to_lower(self) -> str:
        """What a message says may be lowered when there is too little text."""
        fewer = "seqlen" if self.count_of == "select_target" else f"{self.count_of} or seqlen"
        return f"lower {fewer}" + (", set fold=all" if self.of_fold else "")


class Source(ABC):
    """Base of every source of texts.

    A subclass names its ``options``, its ``default_pack`` and the ``joiner`` put between two
    documents that are packed together, whether it ``needs_model`` in memory to give any text, and
    gives :meth:`documents`. A source that is ``generative`` makes its text with the seed: its folds
    are different seeds, where those of other sources are different documents.

    Parameters
    ----------
    argument
        What stands after ``name:`` in the calibration expression.
    options
        Pairs of option name and text, as typed after ``?``.
    inner
        Terms between the parentheses; given only to a source whose ``nested`` is not ``"no"``.
    """

    name: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Option]] = {}
    nested: ClassVar[Nested] = "no"
    needs_model: ClassVar[bool] = False
    generative: ClassVar[bool] = False
    default_pack: str = "concat"
    joiner: str = "\n\n"

    def __init__(
        self,
        argument: str = "",
        options: Iterable[tuple[str, str]] = (),
        inner: Sequence[SourceTerm] = (),
    ) -> None:
        self.argument, self.inner = argument, tuple(inner)
        self.settings = read_options(self.name or type(self).__name__, self.options, options)

    @classmethod
    def of(cls, argument: str, options: Iterable[tuple[str, str]]) -> Source:
        """Return the source of an argument; a class of several variants chooses one of them."""
        return cls(argument, options)

    def validate(self) -> None:
        """Raise a UserError for everything wrong that shows without network and model."""
        return None  # a source without argument and options has nothing to check

    @abstractmethod
    def documents(self, context: Context) -> Iterator[Document]:
        """Yield the documents in ``context.order``."""

    def provenance(self) -> dict[str, Any]:
        """Return plain facts, asked for after the last document was taken.

        Keys used everywhere: ``fingerprint`` (what identifies the content) and ``licence`` (a
        note or None); others are the source's own.
        """
        return {}


class IdSource(Source):
    """Base of a source that gives token ids at once; packing does not apply."""

    default_pack = ""
    generative = True

    def documents(self, context: Context) -> Iterator[Document]:
        """Yield nothing: there is no text."""
        return iter(())

    @abstractmethod
    def sequences(self, context: Context) -> list[Tensor]:
        """Return ``context.count`` int64 tensors of 1 to ``context.seqlen`` ids."""

    def weights(self) -> list[float] | None:
        """Return a positive weight for each sequence just given; None: all one."""
        return None


def visiting_order(total: int, context: Context) -> Sequence[int]:
    """Return the indices ``0 .. total - 1`` in the order asked for."""
    if context.order == "stored":
        return range(total)
    indices = list(range(total))
    random.Random(derive_seed(context.seed, "order")).shuffle(indices)  # noqa: S311
    return indices
