"""``self``: the model that will be compressed writes its own calibration text.

Self-generating calibration synthesis as in arXiv 2410.17711 and its published code: short
prefixes of encyclopedia openings are continued by sampling; the texts the model itself finds
least likely are dropped; the rest is joined by a space and cut into windows. Ours: no text is
drawn with the global random generator, windows do not overlap, special tokens other than the end
of text are never written, and just enough text is made (the published pool is 5,000 texts).
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from lm_calib_plugin.calibration.generation import end_ids, input_device, position_limit
from lm_calib_plugin.calibration.openings import openings_file, read_openings
from lm_calib_plugin.calibration.options import ARGUMENT, Option
from lm_calib_plugin.calibration.sampling import Decoding
from lm_calib_plugin.calibration.sources.base import Context, Document, Source, visiting_order
from lm_calib_plugin.calibration.text_cache import Written, cache_path, keep, recall
from lm_calib_plugin.calibration.tokens import tokenizer_digest
from lm_calib_plugin.calibration.writer import Writer, cut_prefixes, drop_least_likely
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.storage import digest, only_once

REVISION = 1  # raised when the same settings begin to give other texts
MOST_ROUNDS = 12
MOST_TEXTS = 64  # times the first estimate; a model that ends every text at once stops here
MARGIN = 1.1  # texts written beyond the estimate, for those that end early


class SelfGenerated(Source):
    """Text of the dense model itself, kept in the cache under the digest of its settings."""

    name = "self"
    generative = True
    needs_model = True
    default_pack = "concat"
    joiner = " "
    options = {
        "temperature": Option("number", default=Decoding.temperature, above=0),
        "top_p": Option("number", default=Decoding.top_p, above=0, highest=1),
        "top_k": Option("whole", default=Decoding.top_k, lowest=0),
        "repetition_penalty": Option("number", default=Decoding.repetition_penalty, above=0),
        "prefix_tokens": Option("whole", default=2, lowest=1),
        "prefixes": Option(),
        "drop": Option("number", default=0.2, lowest=0, below=1),
        "batch_size": Option("whole", default=64, lowest=1),
        "max_new_tokens": Option("whole", lowest=1),
    }

    def __init__(self, argument: str = "", options: Any = ()) -> None:
        super().__init__(argument, options)
        self._settings: dict[str, Any] = {}
        self._statistics: dict[str, Any] = {}
        self._fingerprint = ""
        self._warnings: list[str] = []

    def validate(self) -> None:
        """Check that a file of openings is there."""
        if self.argument:
            raise UserError(
                ARGUMENT, f"`self` takes no argument, got `{self.argument}`", "options follow a ?"
            )
        if self.settings["prefixes"] is not None:
            openings_file(self.settings["prefixes"])

    def documents(self, context: Context) -> Iterator[Document]:
        """Yield the texts that passed the filter, from the cache when it holds them."""
        if context.model is None:
            raise UserError(
                ARGUMENT,
                "`self` needs the model in memory to write with",
                "give the model, or another source such as file:PATH",
            )
        openings = read_openings(self.settings["prefixes"])
        self._settings = self._resolved(context, openings)
        path = cache_path(self._settings)
        # Without a name for the model its text can not be told from that of another one.
        with only_once(path) if context.model_id else contextlib.nullcontext():
            known, problem = recall(path, self._settings) if context.model_id else (None, "")
            if problem:
                self._warnings.append(f"{problem}; the text was generated again")
            if known is None:
                known = self._generate(context, openings)
                if context.model_id:
                    keep(path, self._settings, *known)
        self._statistics, texts = known
        kept = [(i, text.text) for i, text in enumerate(texts) if text.kept]
        self._fingerprint = digest([text for _, text in kept])
        for place in visiting_order(len(kept), context):
            yield Document(*kept[place])

    def provenance(self) -> dict[str, Any]:
        """Digest of the kept texts, every setting, what generation cost and what it dropped."""
        return {
            "fingerprint": self._fingerprint,
            "licence": None,
            "settings": self._settings,
            "generation": self._statistics,
            "warnings": list(self._warnings),
        }

    def _resolved(self, context: Context, openings: list[str]) -> dict[str, Any]:
        """Return everything that decides the texts; it names the cache file."""
        settings = {k: v for k, v in self.settings.items() if k != "prefixes"}
        limit = position_limit(context.model)
        room = math.inf if limit is None else limit - settings["prefix_tokens"]
        if room < 1:
            raise UserError(
                ARGUMENT,
                f"prefix_tokens={settings['prefix_tokens']} leaves no room to write",
                f"the model takes {limit} positions",
                "lower prefix_tokens",
            )
        wanted = settings["max_new_tokens"] or context.seqlen
        return settings | {
            "revision": REVISION,
            "model": context.model_id,
            "tokenizer": tokenizer_digest(context.tokenizer),
            "openings": digest(openings),
            "ends": sorted(end_ids(context.model, context.tokenizer)),
            "device": input_device(context.model).type,
            "dtype": str(context.model.dtype),
            "vocab_size": context.vocab_size,
            "max_new_tokens": int(min(wanted, room)),
            "seed": context.seed,
            "count": context.count,
            "seqlen": context.seqlen,
            "pack": context.pack,
            **context.cut,
            # What was written until one fold was full is not enough for another.
            **({"fold": context.fold} if context.of_fold else {}),
        }

    def _generate(
        self, context: Context, openings: list[str]
    ) -> tuple[dict[str, Any], list[Written]]:
        """Write rounds of texts until the kept ones give the windows asked for."""
        chosen = self._settings
        writer = Writer(
            context.model,
            context.tokenizer,
            cut_prefixes(
                openings,
                context.tokenizer,
                chosen["prefix_tokens"],
                context.seed,
                context.vocab_size,
            ),
            decoding=Decoding(**{name: chosen[name] for name in asdict(Decoding())}),
            seed=context.seed,
            max_new_tokens=chosen["max_new_tokens"],
            batch_size=chosen["batch_size"],
            vocab_size=context.vocab_size,
        )
        texts: list[Written] = []
        per_window = max(1.0, context.seqlen / writer.max_new_tokens) / (1 - chosen["drop"])
        estimate = round_size = math.ceil(MARGIN * context.count * per_window)
        found = rounds = 0
        with tqdm(
            desc="self-generated text", unit="token", disable=not context.runtime.progress
        ) as bar:
            while rounds < MOST_ROUNDS and len(texts) < MOST_TEXTS * estimate:
                bar.total = (len(texts) + round_size) * writer.max_new_tokens
                texts = drop_least_likely(
                    [*texts, *writer.write(len(texts), round_size, bar)], chosen["drop"]
                )
                rounds += 1
                found = context.windows([text.text for text in texts if text.kept])
                if found >= context.count:
                    return _facts(texts, writer, rounds), texts
                if rounds > 1 and not any(text.kept for text in texts):
                    break
                # At most five times the pool, when hardly a window was found so far.
                missing = MARGIN * context.count / max(found, 0.5) - 1
                round_size = max(1, math.ceil(len(texts) * min(missing, 4.0)))
        raise self._not_enough(context, texts, found)

    def _not_enough(self, context: Context, texts: list[Written], found: int) -> UserError:
        empty = sum(text.perplexity is None for text in texts)
        mean = sum(text.tokens for text in texts) / len(texts)
        return UserError(
            ARGUMENT,
            f"`self`: the model wrote {len(texts)} texts, {empty} of them empty, "
            f"{mean:.1f} tokens each; found {found} windows of {context.seqlen} tokens"
            f"{context.of_fold}, recipe asks {context.count}",
            f"{context.to_lower}, or use another source such as file:PATH",
        )


def _facts(texts: list[Written], writer: Writer, rounds: int) -> dict[str, Any]:
    """Return what generation cost and what the filter did."""
    scores = sorted(text.perplexity for text in texts if text.perplexity is not None)
    kept = [text.perplexity for text in texts if text.kept and text.perplexity is not None]
    tally = writer.tally
    return {
        "texts": len(texts),
        "kept": len(kept),
        "empty": len(texts) - len(scores),
        "finished": sum(text.finished for text in texts),
        "rounds": rounds,
        "prefixes": min(len(texts), len({tuple(p) for p in writer.prefixes})),
        "tokens": tally.tokens,
        "seconds": round(tally.seconds, 3),
        "tokens_per_second": round(tally.tokens / max(tally.seconds, 1e-9), 1),
        "scoring_seconds": round(tally.scoring_seconds, 3),
        "batch_size": tally.batch_size,
        "perplexity": {
            "lowest": scores[0],
            "median": statistics.median(scores),
            "highest_kept": max(kept),
            "highest": scores[-1],
        },
    }
