"""Writing numbered texts: batches that shrink when memory is short, scored, kept when done."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from lm_calib_plugin.calibration.generation import Continuation, write_batch
from lm_calib_plugin.calibration.journal import Batch, Journal
from lm_calib_plugin.calibration.options import ARGUMENT
from lm_calib_plugin.calibration.sampling import Decoding, Schedule, uniform_numbers
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.text_cache import Written
from lm_calib_plugin.calibration.tokens import check_ids, encode, text_ids
from lm_calib_plugin.errors import CalibError, UserError


@dataclass
class Tally:
    """What writing cost, summed over batches; ``resumed`` texts were found on disk."""

    tokens: int = 0
    seconds: float = 0.0
    scoring_seconds: float = 0.0
    batch_size: int = 0
    resumed: int = 0

    def add(self, batch: Batch) -> None:
        """Add a batch; the next one is as large as this one was allowed to be."""
        self.tokens += batch.tokens
        self.seconds += batch.seconds
        self.scoring_seconds += batch.scoring_seconds
        self.batch_size = batch.batch_size


class Writer:
    """Writes numbered texts; the text of a number depends on seed, prefix list and settings only.

    Parameters
    ----------
    model
        The model that writes.
    prefixes
        Lists of ids; text ``i`` continues ``prefixes[i % len(prefixes)]``.
    finish
        Makes the text of a prefix and its continuation, scored.
    decoding, schedule, restart
        As for :func:`~lm_calib_plugin.calibration.generation.write_batch`.
    allowed
        ``[vocabulary]`` bool, False for tokens that must not be written.
    ends
        Ids that end a text.
    journal
        Keeps finished batches; those it holds already are not written again.
    """

    def __init__(
        self,
        model: Any,
        prefixes: Sequence[Sequence[int]],
        finish: Callable[[Sequence[int], Continuation], Written],
        *,
        decoding: Decoding,
        seed: int,
        max_new_tokens: int,
        batch_size: int,
        allowed: torch.Tensor,
        ends: frozenset[int],
        schedule: Schedule | None = None,
        restart: int | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.model, self.prefixes, self.finish = model, prefixes, finish
        self.decoding, self.schedule, self.restart = decoding, schedule, restart
        self.seed, self.max_new_tokens, self.ends = seed, max_new_tokens, ends
        self.allowed = _as_long_as_the_head(allowed, model)
        self.journal = journal or Journal(None, {})
        self.tally = Tally(batch_size=batch_size)

    def write(self, first: int, count: int, bar: tqdm[Any]) -> list[Written]:
        """Return the texts ``first`` to ``first + count - 1``, scored, none judged yet."""
        written: list[Written] = []
        while len(written) < count:
            place = first + len(written)
            batch = self.journal.batches.get(place)
            if batch is None:
                size = min(self.tally.batch_size, count - len(written))
                try:
                    batch = self._batch(place, size, bar)
                except torch.OutOfMemoryError:
                    self._shrink(size)
                    continue
                self.journal.add(batch)
            else:
                self.tally.resumed += len(batch.texts)
                bar.update(batch.tokens)
            self.tally.add(batch)
            written += batch.texts
        return written

    def _batch(self, first: int, count: int, bar: tqdm[Any]) -> Batch:
        began = time.perf_counter()
        prefixes = [self.prefixes[i % len(self.prefixes)] for i in range(first, first + count)]
        rows = write_batch(
            self.model,
            prefixes,
            uniform_numbers(self.seed, first, count, self.max_new_tokens),
            self.decoding,
            self.allowed,
            self.ends,
            schedule=self.schedule,
            restart=self.restart,
            on_tokens=bar.update,
        )
        wrote = time.perf_counter()
        texts = [self.finish(prefix, row) for prefix, row in zip(prefixes, rows, strict=True)]
        return Batch(
            first,
            self.tally.batch_size,
            sum(len(row.ids) for row in rows),
            wrote - began,
            time.perf_counter() - wrote,
            texts,
        )

    def _shrink(self, size: int) -> None:
        """Halve the batch after the device ran out of memory."""
        if size <= 1:
            raise CalibError(
                "self-generated text: out of memory with one text at a time; lower seqlen, or "
                "write shorter texts (calibration=self?max_new_tokens=512)."
            ) from None
        self.tally.batch_size = size // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def text_mask(tokenizer: Any, vocab_size: int, also: Iterable[int] = ()) -> torch.Tensor:
    """Return ``[vocab_size]`` bool: ids that stand for text, and some others."""
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[text_ids(tokenizer, vocab_size)] = True
    allowed[[i for i in also if 0 <= i < vocab_size]] = True
    return allowed


def _as_long_as_the_head(allowed: torch.Tensor, model: Any) -> torch.Tensor:
    """Return the mask, as long as the output head is (it may be longer than the table)."""
    head = model.get_output_embeddings()
    rows = len(allowed) if head is None else head.weight.shape[0]
    return torch.nn.functional.pad(allowed, (0, rows - len(allowed)))


def cut_prefixes(
    openings: Sequence[str], tokenizer: Any, length: int, seed: int, vocab_size: int
) -> list[list[int]]:
    """Return the first ``length`` ids of every opening that has as many, in a seeded order.

    What the tokenizer puts in front (a start token) counts, as in the published recipe.

    Raises
    ------
    UserError
        When no opening is long enough.
    """
    # The first ids need the first characters only; openings may be whole articles.
    texts = [text[: 64 * length + 256] for text in openings]
    random.Random(derive_seed(seed, "openings")).shuffle(texts)  # noqa: S311
    encoded = [encode(tokenizer, text, special=True) for text in texts]
    prefixes = [ids[:length] for ids in encoded if len(ids) >= length]
    if not prefixes:
        raise UserError(
            ARGUMENT,
            f"prefix_tokens={length}: the longest of {len(texts)} openings has "
            f"{max(map(len, encoded), default=0)} tokens",
            "lower prefix_tokens, or name a file of longer openings: self?prefixes=FILE",
        )
    check_ids([i for prefix in prefixes for i in prefix], vocab_size)
    return prefixes
