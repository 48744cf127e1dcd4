"""``set:DIR``: a calibration set made before, kept in a folder.

Named alone, without ``nsamples``, it is used whole and keeps its ``calib_id``: the run is the one
that the inline expression gives. In a mix it gives its share, drawn without replacement.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lm_calib_plugin.calibration.calibration_set import CalibrationSet
from lm_calib_plugin.calibration.options import ARGUMENT
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.set_folder import licences
from lm_calib_plugin.calibration.sources.base import Context, IdSource
from lm_calib_plugin.calibration.tokens import tokenizer_digest
from lm_calib_plugin.errors import UserError

_LONG = ("indices", "rows")


class StoredSet(IdSource):
    """Sequences of a folder made by ``lm-calib calibrate``."""

    name = "set"

    def __init__(self, argument: str = "", options: Any = ()) -> None:
        super().__init__(argument, options)
        self._rows: Sequence[int] = ()

    def validate(self) -> None:
        """Read the whole folder: a damaged set stops the run before a model is loaded."""
        if not self.argument:
            raise UserError(
                ARGUMENT, "`set` needs a folder", "set:DIR, a folder made by lm-calib calibrate"
            )
        _ = self.stored

    @functools.cached_property
    def stored(self) -> CalibrationSet:
        """The set, read once."""
        return CalibrationSet.load(Path(self.argument).expanduser())

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.stored.sequences))

    def check_fits(self, tokenizer: Any, vocab_size: int, seqlen: int) -> None:
        """Raise when this model cannot read the ids, or not as they were meant."""
        mine = tokenizer_digest(tokenizer)
        if self.stored.tokenizer and self.stored.tokenizer != mine:
            raise UserError(
                ARGUMENT,
                f"`set:{self.argument}` was made with tokenizer {self.stored.tokenizer}, "
                f"this model has {mine}",
                "token ids mean something else to another tokenizer",
                "build it again: lm-calib calibrate EXPR --pretrained MODEL --out NEW, "
                "with this MODEL",
            )
        highest = max(int(ids.max()) for ids in self.stored.sequences)
        if highest >= vocab_size:
            raise UserError(
                ARGUMENT,
                f"`set:{self.argument}` holds token id {highest}",
                f"the model has {vocab_size} rows of embeddings",
                "build it again: lm-calib calibrate EXPR --pretrained MODEL --out NEW, "
                "with this MODEL",
            )
        self.check_length(seqlen, "seqlen")

    def check_length(self, most: int, what: str) -> None:
        """Raise when a sequence has more than ``most`` tokens; nothing is cut silently."""
        if self.longest > most:
            raise UserError(
                "seqlen",
                f"`set:{self.argument}` holds sequences of {self.longest} tokens, {what} is {most}",
                "a set is never cut",
                f"give seqlen>={self.longest}, or build it again with --seqlen {most}",
            )

    def check_count(self, count: int, named: str = "nsamples") -> None:
        """Raise when fewer sequences are stored."""
        if count > self.stored.nsamples:
            raise UserError(
                named,
                f"`set:{self.argument}` holds {self.stored.nsamples} sequences, "
                f"recipe asks {count}",
                f"at most {self.stored.nsamples}",
                f"lower {named}"
                + (", or drop it to use the whole set" if named == "nsamples" else ""),
            )

    def check_made_with(self, name: str, wanted: str) -> None:
        """Raise when a source of the set was made with another ``fold`` or ``pack``."""
        made = {source.get(name) for source in self.stored.sources} - {wanted, None}
        if made:
            raise UserError(
                name,
                f"got {wanted!r}, `set:{self.argument}` was built with {min(made)!r}",
                "documents of a set can not be told apart again",
                f"drop {name}, or build it again with --{name} {wanted}",
            )

    def first(self, count: int | None) -> CalibrationSet:
        """Return the first ``count`` sequences as a set, or all of them under their own name."""
        stored = self.stored
        total = stored.nsamples if count is None else count
        self.check_count(total)
        origin = {"folder": self.argument, "calib_id": stored.calib_id}
        return CalibrationSet.of(
            stored.sequences[:total],
            seqlen=stored.seqlen,
            seed=stored.seed,
            tokenizer=stored.tokenizer,
            sources=[_first(source, total) | {"from_set": origin} for source in stored.sources],
            weights=None if stored.weights is None else stored.weights[:total],
        )

    def sequences(self, context: Context) -> list[Tensor]:
        """Draw ``context.count`` sequences without replacement."""
        self.check_fits(context.tokenizer, context.vocab_size, context.seqlen)
        stored = self.stored
        self.check_count(context.count, context.count_of)
        generator = random.Random(derive_seed(context.seed, "set"))  # noqa: S311
        self._rows = generator.sample(range(stored.nsamples), context.count)
        return [stored.sequences[row] for row in self._rows]

    def weights(self) -> list[float] | None:
        """Return the weights of the drawn sequences, of mean 1: the share of the term stays."""
        if self.stored.weights is None or not self._rows:
            return None
        drawn = [self.stored.weights[row] for row in self._rows]
        mean = sum(drawn) / len(drawn)
        return [weight / mean for weight in drawn]

    def provenance(self) -> dict[str, Any]:
        """Name of the set, what was drawn of it, and the records of its own sources."""
        stored = self.stored
        notes = licences(stored.sources)
        return {
            "fingerprint": stored.calib_id,
            "licence": "; ".join(notes) or None,
            "set": {
                "calib_id": stored.calib_id,
                "nsamples": stored.nsamples,
                "sources": stored.summary()["sources"],
            },
            "drawn": list(self._rows),
        }


def _first(source: dict[str, Any], count: int) -> dict[str, Any]:
    """Cut the record of a source to the rows below ``count``."""
    rows = source.get("rows")
    if rows is None:
        return dict(source)
    kept = [place for place, row in enumerate(rows) if row < count]
    cut = {
        name: [source[name][place] for place in kept]
        for name in _LONG
        if len(source.get(name) or ()) == len(rows)
    }
    return source | cut | {"nsequences": len(kept)}
