"""``longdoc``: one window inside one long document."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from lm_calib_plugin.calibration.packers import base
from lm_calib_plugin.calibration.packers.base import Packed, Packer, too_few
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.sources.base import Context, Document
from lm_calib_plugin.calibration.tokens import encode


class LongDocument(Packer):
    """One window, uniformly drawn, inside one document longer than ``seqlen`` tokens.

    Documents are visited in a seeded order without replacement, as the C4 loaders of SparseGPT
    and Wanda do (there with replacement).
    """

    order = "shuffled"

    def pack(self, documents: Iterable[Document], context: Context, joiner: str) -> Packed:
        """Tokenize documents one by one until enough windows are found."""
        generator = random.Random(derive_seed(context.seed, "window"))  # noqa: S311
        sequences: list[list[int]] = []
        indices: list[Any] = []
        seen = misses = 0
        for document in documents:
            seen += 1
            misses += 1
            ids = _if_longer(document.text, context)
            if ids:
                start = generator.randrange(len(ids) - context.seqlen + 1)
                sequences.append(ids[start : start + context.seqlen])
                indices.append([document.number, start])
                misses = 0
            if len(sequences) == context.count or misses == base.PATIENCE:
                break
        if len(sequences) < context.count:
            raise too_few(len(sequences), seen, context, "or set pack=concat")
        return Packed(sequences, indices, seen, truncated=len(sequences))

    def windows(self, texts: Sequence[str], context: Context, joiner: str) -> int:
        """Count the texts that are long enough."""
        return sum(bool(_if_longer(text, context)) for text in texts)


def _if_longer(text: str, context: Context) -> list[int]:
    """Return the ids of a text of more than ``seqlen`` tokens, else nothing.

    A token stands for at least one byte, so most short texts need not be tokenized.
    """
    if len(text.encode()) <= context.seqlen:
        return []
    ids = encode(context.tokenizer, text)
    return ids if len(ids) > context.seqlen else []
