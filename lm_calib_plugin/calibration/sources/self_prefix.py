"""``self:prefix`` (short: ``self``): the model continues short openings.

Self-generating calibration synthesis as in arXiv 2410.17711 and its published code: short
prefixes of encyclopedia openings are continued by sampling; the texts the model itself finds
least likely are dropped; the rest is joined by a space and cut into windows. Ours, unless
``mode=paper`` asks for the published way: near-duplicates and texts that go in circles are
dropped too, windows do not overlap, and just enough text is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from lm_calib_plugin.calibration.generation import (
    Continuation,
    end_ids,
    perplexity,
    position_limit,
)
from lm_calib_plugin.calibration.guards import Guards
from lm_calib_plugin.calibration.journal import Journal
from lm_calib_plugin.calibration.openings import openings_file, read_openings
from lm_calib_plugin.calibration.options import ARGUMENT, Option
from lm_calib_plugin.calibration.sampling import Decoding
from lm_calib_plugin.calibration.sources.base import Context, Document, visiting_order
from lm_calib_plugin.calibration.sources.self_generated import (
    BATCH_SIZE,
    GUARDS,
    MARGIN,
    SAMPLING,
    SelfGenerated,
)
from lm_calib_plugin.calibration.text_cache import Written
from lm_calib_plugin.calibration.tokens import encode
from lm_calib_plugin.calibration.writer import Writer, cut_prefixes, text_mask
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.storage import digest

PAPER: Final = {
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 50,
    "repetition_penalty": 1.2,
    "drop": 0.2,
    "dedup": 0,
    "repetition": 0.0,
    "max_new_tokens": 2048,
}
PAPER_POOL = 5000
PAPER_PACK = "windows"


class SelfFromPrefix(SelfGenerated):
    """Continuations of openings, re-tokenized and packed like any other text."""

    variant = "prefix"
    default_pack = "concat"
    joiner = " "
    file_options = ("prefixes",)
    options = {
        **SAMPLING,
        **GUARDS,
        **BATCH_SIZE,
        "prefix_tokens": Option("whole", default=2, lowest=1),
        "prefixes": Option(),
        "max_new_tokens": Option("whole", lowest=1),
        "pool": Option("whole", lowest=1),
        "mode": Option(choices=("paper",)),
    }

    def __init__(self, argument: str = "", options: Iterable[tuple[str, str]] = ()) -> None:
        pairs = list(options)
        super().__init__(argument, pairs)
        self._given = {name for name, _ in pairs}
        self._paper = self.settings["mode"] == "paper"
        if self._paper:
            self.default_pack = PAPER_PACK
            for name, value in PAPER.items():
                if name not in self._given:
                    self.settings[name] = value
            self.settings["pool"] = self.settings["pool"] or PAPER_POOL

    def validate(self) -> None:
        """Check that a file of openings is there and that nothing contradicts ``mode=paper``."""
        for name, value in PAPER.items() if self._paper else ():
            if self.settings[name] != value:
                raise UserError(
                    ARGUMENT,
                    f"mode=paper writes with {name}={value:g}, got {self.settings[name]:g}",
                    "beside it: prefix_tokens, prefixes, pool, batch_size",
                    f"drop `{name}`, or drop `mode`",
                )
        if self.settings["prefixes"] is not None:
            openings_file(self.settings["prefixes"])

    def documents(self, context: Context) -> Iterator[Document]:
        """Yield the texts that passed the guards, from the cache when it holds them."""
        if self._paper and context.pack != PAPER_PACK:
            raise UserError(
                "pack",
                f"mode=paper draws its windows with pack={PAPER_PACK}, got {context.pack}",
                "drop `pack`, or drop `mode`",
            )
        kept = [(i, text.text) for i, text in enumerate(self._pool(context)) if text.kept]
        for place in visiting_order(len(kept), context):
            yield Document(*kept[place])

    def provenance(self) -> dict[str, Any]:
        """Add, in paper mode, what differs from the published code."""
        record = super().provenance()
        return record | ({"differs_from_published": self._differences()} if self._paper else {})

    def _differences(self) -> list[str]:
        chosen = self._settings
        found = [
            "random numbers: one generator per text, inverse distribution function; published: "
            "the global generator of torch",
            "windows: Python's generator, the last possible start included",
            "special tokens other than those that end a text are never written",
        ]
        if not self.settings["prefixes"]:
            found.append(
                f"prefixes: {chosen.get('openings_count')} openings of this package, in turn; "
                "published: one of each of 5,000 Wikipedia texts (name a file: prefixes=FILE)"
            )
        if chosen.get("max_new_tokens") != PAPER["max_new_tokens"]:
            found.append(
                f"texts of at most {chosen.get('max_new_tokens')} tokens: the model takes no more "
                f"positions; published: {PAPER['max_new_tokens']}"
            )
        if chosen.get("pool") != PAPER_POOL:
            found.append(f"{chosen.get('pool')} texts; published: {PAPER_POOL}")
        if chosen.get("prefix_tokens") != 2:
            found.append(f"prefixes of {chosen.get('prefix_tokens')} tokens; published code: 2")
        return found

    def _guards(self) -> Guards:
        chosen = self.settings
        return Guards(
            chosen["drop"], bool(chosen["dedup"]), chosen["repetition"], percentile=self._paper
        )

    def _fixed_pool(self) -> int | None:
        return self.settings["pool"]  # type: ignore[no-any-return]

    def _resolved(self, context: Context) -> dict[str, Any]:
        limit, length = position_limit(context.model), self.settings["prefix_tokens"]
        room = math.inf if limit is None else limit - length
        if room < 1:
            raise UserError(
                ARGUMENT,
                f"prefix_tokens={length} leaves no room to write",
                f"the model takes {limit} positions",
                "lower prefix_tokens",
            )
        openings = read_openings(self.settings["prefixes"])
        return {
            "openings": digest(openings),
            "openings_count": len(openings),
            "max_new_tokens": int(min(self.settings["max_new_tokens"] or context.seqlen, room)),
        }

    def _writer(self, context: Context, journal: Journal) -> Writer:
        model, tokenizer, limit = context.model, context.tokenizer, position_limit(context.model)

        def finish(prefix: Sequence[int], row: Continuation) -> Written:
            text = tokenizer.decode(
                [*prefix, *row.ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            ids = encode(tokenizer, text, special=True)[:limit]
            # The published code scores a text of its prefix alone like any other.
            empty = not (self._paper or tokenizer.decode(row.ids, skip_special_tokens=True).strip())
            score = None if empty or len(ids) < 2 else perplexity(model, ids)
            return Written(text, len(row.ids), row.end is not None, score)

        ends = end_ids(model, tokenizer)
        return Writer(
            model,
            cut_prefixes(
                read_openings(self.settings["prefixes"]),
                tokenizer,
                self.settings["prefix_tokens"],
                context.seed,
                context.vocab_size,
            ),
            finish,
            decoding=Decoding(**{name: self.settings[name] for name in SAMPLING}),
            seed=context.seed,
            max_new_tokens=self._settings["max_new_tokens"],
            batch_size=self.settings["batch_size"],
            allowed=text_mask(tokenizer, context.vocab_size, ends),
            ends=ends,
            journal=journal,
        )

    def _estimate(self, context: Context, writer: Writer) -> int:
        per_window = max(1.0, context.seqlen / writer.max_new_tokens) / (1 - self.settings["drop"])
        return math.ceil(MARGIN * context.count * per_window)

    def _found(self, context: Context, kept: Sequence[Written]) -> int:
        return context.windows([text.text for text in kept])
