"""``null:KIND``: token sequences without meaning, the controls that every claim needs.

======================  ===========================================================================
``null:random``         every id that stands for text, equally likely (``random`` is the same)
``null:ascii``          random letters, digits and punctuation, tokenized
``null:ellipsis``       ``.`` repeated: identical sequences
``null:shuffle(A)``     the tokens of a draw of A, permuted over all its sequences: same tokens,
                        same lengths, no order
``null:unigram(A)``     independent tokens with the frequencies of a draw of A
======================  ===========================================================================

The draw of A is the one that A alone gives at the same place of the expression with the same seed.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.calibration.options import ARGUMENT
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.sources.base import Context, IdSource
from lm_calib_plugin.calibration.sources.random_ids import RandomIds
from lm_calib_plugin.calibration.tokens import encode
from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.expression import SourceTerm, expression_text

PIECE = 1000  # characters tokenized at once
CHARACTERS = string.ascii_letters + string.digits + string.punctuation
OF_A_DRAW = ("shuffle", "unigram")
KINDS = ("random", "ascii", "ellipsis", *OF_A_DRAW)


class Null(IdSource):
    """One of :data:`KINDS`; ``inner`` is what ``shuffle`` and ``unigram`` are made of."""

    name = "null"
    nested = "varies"

    def __init__(
        self,
        argument: str = "",
        options: Iterable[tuple[str, str]] = (),
        inner: Sequence[SourceTerm] = (),
    ) -> None:
        super().__init__(argument, options, inner)
        self._facts: dict[str, Any] = {}

    def validate(self) -> None:
        """Check the kind, and that a source stands inside where one is needed, and only there."""
        kind = self.argument
        if kind not in KINDS:
            raise UserError(
                ARGUMENT,
                f"got null:{kind}" if kind else "`null` needs a kind",
                nearest(kind, KINDS),
                f"null:KIND with one of {listed(KINDS)}, for instance null:shuffle(c4)",
            )
        if kind in OF_A_DRAW and not self.inner:
            raise UserError(
                ARGUMENT,
                f"`null:{kind}` needs the source whose tokens it takes",
                fix=f"null:{kind}(c4)",
            )
        if kind not in OF_A_DRAW and self.inner:
            raise UserError(
                ARGUMENT,
                f"`null:{kind}` is made of no other source, got {expression_text(self.inner)}",
                f"those that are: {listed(f'null:{k}' for k in OF_A_DRAW)}",
                f"write null:{kind}",
            )

    def sequences(self, context: Context) -> list[Tensor]:
        """Return ``context.count`` sequences of the kind."""
        self.validate()
        if self.argument in OF_A_DRAW:
            return self._of_a_draw(context)
        if self.argument == "random":
            plain = RandomIds()
            made = plain.sequences(context)
            self._facts = plain.provenance()
            return made
        self._facts = {"piece_characters": PIECE}
        if self.argument == "ellipsis":
            dots = _filled(lambda: "." * PIECE, context)
            return [dots.clone() for _ in range(context.count)]
        return [_filled(_random_text(context.seed, n), context) for n in range(context.count)]

    def provenance(self) -> dict[str, Any]:
        """Records of the sources inside, and the license notes that follow the tokens."""
        return dict(self._facts)

    def _of_a_draw(self, context: Context) -> list[Tensor]:
        if context.draw is None:
            raise TypeError("a context without `draw` gives no other source")
        drawn, records = context.draw(tuple(self.inner), context.count)
        licences = dict.fromkeys(r["licence"] for r in records if r.get("licence"))
        self._facts = {"inner": records, "licence": "; ".join(licences) or None}
        tokens = torch.tensor([i for ids in drawn for i in ids], dtype=torch.int64)
        generator = torch.Generator().manual_seed(derive_seed(context.seed, self.argument))
        if self.argument == "shuffle":
            picked = torch.randperm(len(tokens), generator=generator)
        else:
            picked = torch.randint(len(tokens), (len(tokens),), generator=generator)
        return list(tokens[picked].split([len(ids) for ids in drawn]))


def _random_text(seed: int, number: int) -> Callable[[], str]:
    """Return a maker of pieces of random text, with a generator of its own."""
    generator = random.Random(derive_seed(seed, "ascii", number))  # noqa: S311
    return lambda: "".join(generator.choices(CHARACTERS, k=PIECE))


def _filled(piece: Callable[[], str], context: Context) -> Tensor:
    """Return exactly ``context.seqlen`` ids of pieces tokenized one by one."""
    ids: list[int] = []
    while len(ids) < context.seqlen:
        more = encode(context.tokenizer, piece())
        if not more:
            raise UserError(
                "tokenizer",
                "gives no token for letters and punctuation",
                "such text cannot calibrate this model",
                "calibration=null:random",
            )
        ids.extend(more)
    return torch.tensor(ids[: context.seqlen], dtype=torch.int64)
