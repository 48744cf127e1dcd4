"""``pad``: one document a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lm_calib_plugin.calibration.packers import base
from lm_calib_plugin.calibration.packers.base import Packed, Packer, too_few
from lm_calib_plugin.calibration.sources.base import Context, Document
from lm_calib_plugin.calibration.tokens import encode


class Pad(Packer):
    """One document a row, cut at ``seqlen``; shorter documents stay short.

    The name says what others do with the short rows. Here nothing is stored for a pad, so that
    no statistic can count one.
    """

    order = "shuffled"

    def pack(self, documents: Iterable[Document], context: Context, joiner: str) -> Packed:
        """Take the first documents that hold any text."""
        sequences: list[list[int]] = []
        indices: list[Any] = []
        seen = truncated = empty = 0
        for document in documents:
            seen += 1
            ids = encode(context.tokenizer, document.text, special=True) if document.text else []
            if document.text.strip() and ids:
                truncated += len(ids) > context.seqlen
                sequences.append(ids[: context.seqlen])
                indices.append(document.number)
            else:
                empty += 1
            if len(sequences) == context.count or empty == base.PATIENCE:
                break
        if len(sequences) < context.count:
            raise too_few(len(sequences), seen, context, "or give more documents")
        return Packed(sequences, indices, seen, truncated, {"empty": empty})

    def windows(self, texts: Sequence[str], context: Context, joiner: str) -> int:
        """Count the texts that are not empty."""
        return sum(bool(text.strip()) for text in texts)
