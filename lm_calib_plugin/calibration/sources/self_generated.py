"""``self``: the model that will be compressed writes its own calibration data.

Three variants stand in files of their own: ``self:prefix`` (short: ``self``), ``self:bos`` and
``self:chat``. Here is what they share: a pool of numbered texts that grows until it is enough, is
judged, and is kept in the cache under the digest of its settings.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from tqdm import tqdm

from lm_calib_plugin.calibration.generation import end_ids, input_device
from lm_calib_plugin.calibration.guards import REASONS, Guards
from lm_calib_plugin.calibration.journal import Journal, journal_path
from lm_calib_plugin.calibration.options import ARGUMENT, Option
from lm_calib_plugin.calibration.sampling import Decoding
from lm_calib_plugin.calibration.sources.base import Context, Source
from lm_calib_plugin.calibration.text_cache import Written, cache_path, keep, recall
from lm_calib_plugin.calibration.tokens import encode, tokenizer_digest
from lm_calib_plugin.calibration.writer import Writer
from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.storage import cache_dir, digest, only_once

REVISION = 2  # raised when the same settings begin to give other texts
MOST_ROUNDS = 12
MOST_TEXTS = 64  # times the first estimate; a model that ends every text at once stops here
HOPELESS = 3  # a pool that has grown to so many times its size and gives nothing more stops
MARGIN = 1.1  # texts written beyond the estimate, for those that end early

SAMPLING: dict[str, Option] = {
    "temperature": Option("number", default=Decoding.temperature, above=0),
    "top_p": Option("number", default=Decoding.top_p, above=0, highest=1),
    "top_k": Option("whole", default=Decoding.top_k, lowest=0),
    "repetition_penalty": Option("number", default=Decoding.repetition_penalty, above=0),
}
GUARDS: dict[str, Option] = {
    "drop": Option("number", default=Guards.drop, lowest=0, below=1),
    "dedup": Option("whole", default=1, lowest=0, highest=1),
    "repetition": Option("number", default=Guards.repetition, lowest=0, highest=1),
}
BATCH_SIZE: dict[str, Option] = {"batch_size": Option("whole", default=64, lowest=1)}
VARIANTS = ("prefix", "bos", "chat")


class SelfGenerated(Source):
    """Base of the variants, and the way to them: :meth:`of` chooses by the argument."""

    name = "self"
    variant: ClassVar[str] = ""
    file_options: ClassVar[tuple[str, ...]] = ()  # their content counts, not their name
    generative = True
    needs_model = True

    def __init__(self, argument: str = "", options: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(argument, options)
        self._settings: dict[str, Any] = {}
        self._statistics: dict[str, Any] = {}
        self._fingerprint = ""
        self._text_file: str | None = None
        self._warnings: list[str] = []
        self._ids: dict[str, list[int]] = {}

    @classmethod
    def of(cls, argument: str, options: Iterable[tuple[str, str]]) -> Source:
        """Return the source of a variant; no argument stands for ``prefix``."""
        if cls is not SelfGenerated:
            return cls(argument, options)
        from lm_calib_plugin.calibration.sources.self_bos import SelfFromStart
        from lm_calib_plugin.calibration.sources.self_chat import SelfChat
        from lm_calib_plugin.calibration.sources.self_prefix import SelfFromPrefix

        known: tuple[type[SelfGenerated], ...] = (SelfFromPrefix, SelfFromStart, SelfChat)
        for variant in known:
            if variant.variant == (argument or "prefix"):
                return variant(argument, options)
        raise UserError(
            ARGUMENT,
            f"`self` has no variant `{argument}`",
            nearest(argument, VARIANTS),
            f"its variants: {listed(f'self:{name}' for name in VARIANTS)}; options follow a ?",
        )

    def provenance(self) -> dict[str, Any]:
        """Digest of the kept texts, every setting, what generation cost and what it dropped."""
        return {
            "fingerprint": self._fingerprint,
            "licence": None,
            "settings": self._settings,
            "generation": self._statistics,
            "text_file": self._text_file,
            "warnings": list(self._warnings),
        }

    # --- what a variant says

    @abstractmethod
    def _resolved(self, context: Context) -> dict[str, Any]:
        """Return what decides the texts beyond options, model and seed; check it on the way."""

    @abstractmethod
    def _writer(self, context: Context, journal: Journal) -> Writer:
        """Return the writer of the numbered texts."""

    @abstractmethod
    def _estimate(self, context: Context, writer: Writer) -> int:
        """Return how many texts to begin with."""

    @abstractmethod
    def _found(self, context: Context, kept: Sequence[Written]) -> int:
        """Return how many sequences the kept texts give."""

    def _guards(self) -> Guards:
        return Guards(
            drop=self.settings["drop"],
            dedup=bool(self.settings["dedup"]),
            repetition=self.settings["repetition"],
        )

    def _fixed_pool(self) -> int | None:
        """Return how many texts are written, whatever is asked; None: as many as it takes."""
        return None

    # --- what they share

    def _pool(self, context: Context) -> list[Written]:
        """Return every text, judged: from the cache when it holds them."""
        if context.model is None:
            raise UserError(
                ARGUMENT,
                f"`{self.name}` needs the model in memory to write with",
                "give the model, or another source such as file:PATH",
            )
        self._settings = self._all_settings(context)
        path = cache_path(self._settings)
        # Without a name for the model its text can not be told from that of another one.
        with only_once(path) if context.model_id else contextlib.nullcontext():
            known, problem = recall(path, self._settings) if context.model_id else (None, "")
            if problem:
                self._warnings.append(f"{problem}; the text was generated again")
            if known is None:
                journal = Journal(journal_path(path) if context.model_id else None, self._settings)
                known = self._generate(context, journal)
                if context.model_id:
                    keep(path, self._settings, *known)
                    journal.remove()
        if context.model_id:
            self._text_file = path.relative_to(cache_dir()).as_posix()
        self._statistics, texts = known
        self._fingerprint = digest([text.text for text in texts if text.kept])
        return texts

    def _all_settings(self, context: Context) -> dict[str, Any]:
        """Return everything that decides the texts; it names the cache file."""
        settings = {k: v for k, v in self.settings.items() if k not in self.file_options}
        settings |= {
            "revision": REVISION,
            "variant": self.variant,
            "model": context.model_id,
            "tokenizer": tokenizer_digest(context.tokenizer),
            "ends": sorted(end_ids(context.model, context.tokenizer)),
            "device": input_device(context.model).type,
            "dtype": str(context.model.dtype),
            "vocab_size": context.vocab_size,
            "seed": context.seed,
        }
        if self._fixed_pool() is None:  # then the pool grows until it is enough for these
            settings |= {"count": context.count, "seqlen": context.seqlen, "pack": context.pack}
            settings |= context.cut
        return settings | self._resolved(context)

    def _generate(self, context: Context, journal: Journal) -> tuple[dict[str, Any], list[Written]]:
        """Write rounds of texts until the kept ones give the sequences asked for."""
        writer, fixed = self._writer(context, journal), self._fixed_pool()
        estimate = round_size = fixed or self._estimate(context, writer)
        guards = self._guards()
        texts: list[Written] = []
        found = rounds = grew_at = 0
        with tqdm(
            desc="self-generated text", unit="token", disable=not context.runtime.progress
        ) as bar:
            while rounds < MOST_ROUNDS and len(texts) < MOST_TEXTS * estimate:
                bar.total = (len(texts) + round_size) * writer.max_new_tokens
                texts = guards.judge(
                    [*texts, *writer.write(len(texts), round_size, bar)],
                    lambda text: self._ids_of(context, text),
                )
                rounds += 1
                before = found
                found = self._found(context, [text for text in texts if text.kept])
                if found >= context.count:
                    return _facts(texts, writer, rounds), texts
                grew_at = len(texts) if found > before or rounds == 1 else grew_at
                if fixed or len(texts) >= HOPELESS * grew_at:
                    break
                # At most five times the pool, when hardly a window was found so far.
                missing = MARGIN * context.count / max(found, 0.5) - 1
                round_size = max(1, math.ceil(len(texts) * min(missing, 4.0)))
        raise self._not_enough(context, texts, found)

    def _ids_of(self, context: Context, text: Written) -> Sequence[int]:
        """Return the ids that the guards look at: those of the text, tokenized once."""
        if text.ids:
            return text.ids
        if text.text not in self._ids:
            self._ids[text.text] = encode(context.tokenizer, text.text)
        return self._ids[text.text]

    def _not_enough(self, context: Context, texts: list[Written], found: int) -> UserError:
        mean = sum(text.tokens for text in texts) / len(texts)
        dropped = _dropped(texts)
        lost = [f"{n} dropped ({why.replace('_', '-')})" for why, n in dropped.items() if n]
        way_out = "lower seqlen or nsamples"
        if dropped["repetition"] + dropped["near_duplicate"] > len(texts) // 2:
            way_out += ", raise temperature, set repetition=0 or dedup=0"
        if dropped["unfinished"] > len(texts) // 2:
            way_out += ", raise max_new_tokens"
        if self._fixed_pool():
            way_out += ", raise pool"
        return UserError(
            ARGUMENT,
            f"`{self.name}`: the model wrote {len(texts)} texts of {mean:.1f} tokens each, "
            f"{listed(lost) or 'none dropped'}; found {found} windows of {context.seqlen} tokens, "
            f"recipe asks {context.count}",
            f"{way_out}, or use another source such as file:PATH",
        )


def _dropped(texts: Sequence[Written]) -> dict[str, int]:
    tally = Counter(text.dropped for text in texts)
    return {reason: tally[reason] for reason in REASONS}


def _facts(texts: list[Written], writer: Writer, rounds: int) -> dict[str, Any]:
    """Return what generation cost and what the guards did."""
    scores = sorted(text.perplexity for text in texts if text.perplexity is not None)
    kept = [text.perplexity for text in texts if text.kept and text.perplexity is not None]
    tally = writer.tally
    return {
        "texts": len(texts),
        "kept": len(kept),
        "dropped": _dropped(texts),
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
