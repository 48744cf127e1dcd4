"""``concat``: documents joined into one text, then cut."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Sequence

from lm_calib_plugin.calibration.packers.base import Packed, Packer, too_few
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.sources.base import Context, Document
from lm_calib_plugin.calibration.tokens import encode_joined

# A source is read up to this many tokens (at least eight times what is asked) and windows are drawn
# there; WikiText-2 (2.4 M tokens) is read whole, C4 is not.
POOL_TOKENS = 1 << 22
BATCH = 1 << 20  # characters tokenized at a time


def read_joined(
    documents: Iterable[Document], context: Context, joiner: str
) -> tuple[array[int], int, bool]:
    """Return the ids of the documents joined, how many were read, and whether all were."""
    bound = max(POOL_TOKENS, 8 * context.count * context.seqlen)
    ids = array("q")  # a list of Python integers would take five times the memory
    batch: list[str] = []
    seen = size = 0
    whole = True
    for document in documents:
        seen += 1
        batch.append(document.text)
        size += len(document.text)
        if size > BATCH:
            # The joiner between two batches belongs to the earlier one.
            ids.extend(encode_joined(context.tokenizer, [*batch, ""], joiner))
            batch, size = [], 0
            if len(ids) >= bound:
                whole = False
                break
    ids.extend(encode_joined(context.tokenizer, batch, joiner))
    return ids, seen, whole


class Concatenate(Packer):
    """Documents joined, tokenized, cut into windows that do not overlap, drawn with the seed."""

    def pack(self, documents: Iterable[Document], context: Context, joiner: str) -> Packed:
        """Read up to the bound, cut, draw without replacement."""
        ids, seen, whole = read_joined(documents, context, joiner)
        starts = list(range(0, len(ids) - context.seqlen + 1, context.seqlen))
        if len(starts) < context.count:
            raise too_few(len(starts), seen, context, "or give more text")
        random.Random(derive_seed(context.seed, "window")).shuffle(starts)  # noqa: S311
        drawn = starts[: context.count]
        return Packed(
            [ids[start : start + context.seqlen].tolist() for start in drawn],
            list(drawn),
            seen,
            truncated=0,
            facts={"windows": len(starts), "read_whole": whole},
        )

    def windows(self, texts: Sequence[str], context: Context, joiner: str) -> int:
        """Count the whole windows of the joined texts."""
        return len(encode_joined(context.tokenizer, texts, joiner)) // context.seqlen
