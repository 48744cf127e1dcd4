"""Writing a pool of texts: prefixes, batches that shrink when memory is short, scores, filter."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from lm_calib_plugin.calibration.generation import (
    end_ids,
    perplexity,
    position_limit,
    write_batch,
)
from lm_calib_plugin.calibration.options import ARGUMENT
from lm_calib_plugin.calibration.sampling import Decoding, uniform_numbers
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.text_cache import Written
from lm_calib_plugin.calibration.tokens import check_ids, encode, text_ids
from lm_calib_plugin.errors import CalibError, UserError


@dataclass
class Tally:
    """What writing cost, summed over batches."""

    tokens: int = 0
    seconds: float = 0.0
    scoring_seconds: float = 0.0
    batch_size: int = 0


class Writer:
    """Writes numbered texts; the text of a number depends on seed, prefix list and settings only.

    Parameters
    ----------
    model, tokenizer
        The model that writes and its tokenizer.
    prefixes
        Equally long lists of ids; text ``i`` continues ``prefixes[i % len(prefixes)]``.
    vocab_size
        Rows of the embedding table.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prefixes: Sequence[Sequence[int]],
        *,
        decoding: Decoding,
        seed: int,
        max_new_tokens: int,
        batch_size: int,
        vocab_size: int,
    ) -> None:
        self.model, self.tokenizer, self.prefixes = model, tokenizer, prefixes
        self.decoding, self.seed, self.max_new_tokens = decoding, seed, max_new_tokens
        self.limit = position_limit(model)
        self.ends = end_ids(model, tokenizer)
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[text_ids(tokenizer, vocab_size)] = True
        allowed[[i for i in self.ends if 0 <= i < vocab_size]] = True
        self.allowed = allowed
        self.tally = Tally(batch_size=batch_size)

    def write(self, first: int, count: int, bar: tqdm[Any]) -> list[Written]:
        """Return the texts ``first`` to ``first + count - 1``, scored, none filtered yet."""
        written: list[Written] = []
        while len(written) < count:
            size = min(self.tally.batch_size, count - len(written))
            try:
                rows = self._batch(first + len(written), size, bar)
            except torch.OutOfMemoryError:
                self._shrink(size)
                continue
            began = time.perf_counter()
            written += [self._scored(prefix, row) for prefix, row in rows]
            self.tally.scoring_seconds += time.perf_counter() - began
        return written

    def _batch(
        self, first: int, count: int, bar: tqdm[Any]
    ) -> list[tuple[Sequence[int], list[int]]]:
        began = time.perf_counter()
        prefixes = [self.prefixes[i % len(self.prefixes)] for i in range(first, first + count)]
        rows = write_batch(
            self.model,
            torch.tensor(prefixes, dtype=torch.int64),
            uniform_numbers(self.seed, first, count, self.max_new_tokens),
            self.decoding,
            self._allowed_rows(),
            self.ends,
            lambda texts: bar.update(texts),
        )
        self.tally.tokens += sum(map(len, rows))
        self.tally.seconds += time.perf_counter() - began
        return list(zip(prefixes, rows, strict=True))

    def _allowed_rows(self) -> torch.Tensor:
        """Return the mask, as long as the output head is (it may be longer than the table)."""
        head = self.model.get_output_embeddings()
        rows = len(self.allowed) if head is None else head.weight.shape[0]
        return torch.nn.functional.pad(self.allowed, (0, rows - len(self.allowed)))

    def _scored(self, prefix: Sequence[int], row: list[int]) -> Written:
        text = self.tokenizer.decode(
            [*prefix, *row], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        ids = encode(self.tokenizer, text, special=True)[: self.limit]
        empty = not self.tokenizer.decode(row, skip_special_tokens=True).strip()
        score = None if empty or len(ids) < 2 else perplexity(self.model, ids)
        return Written(text, len(row), len(row) < self.max_new_tokens, score, kept=False)

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


def drop_least_likely(texts: Sequence[Written], drop: float) -> list[Written]:
    """Mark the texts to keep: all but the ``floor(drop * n)`` of highest perplexity.

    Texts without a perplexity (empty) are never kept and do not count in ``n``. Of equal
    perplexities the later text goes first.
    """
    scored = [i for i, text in enumerate(texts) if text.perplexity is not None]
    scored.sort(key=lambda i: (texts[i].perplexity, i))
    kept = set(scored[: len(scored) - math.floor(len(scored) * drop + 1e-9)])
    return [replace(text, kept=i in kept) for i, text in enumerate(texts)]
