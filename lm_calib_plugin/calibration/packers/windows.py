"""``windows``: windows at random places of one joined text, with replacement."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from lm_calib_plugin.calibration.packers.base import Packed, Packer, too_few
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.sources.base import Context, Document
from lm_calib_plugin.calibration.tokens import encode

# More characters than the 5,000 texts of 2,048 tokens of the paper.
WINDOW_CHARACTERS = 1 << 26


class Windows(Packer):
    """Documents joined, tokenized once, windows at random starts, with replacement.

    Windows may overlap, as in the loaders of arXiv 2410.17711 for text of its own and Wikipedia.
    Nothing is tokenized in pieces, so the text read is bounded by its characters.
    """

    def pack(self, documents: Iterable[Document], context: Context, joiner: str) -> Packed:
        """Read up to the bound, tokenize, draw every window by itself."""
        bound = max(WINDOW_CHARACTERS, 64 * context.count * context.seqlen)
        texts: list[str] = []
        size = 0
        whole = True
        for document in documents:
            if size > bound:
                whole = False
                break
            texts.append(document.text)
            size += len(document.text)
        ids = encode(context.tokenizer, joiner.join(texts))
        last = len(ids) - context.seqlen
        if last < 0:
            raise too_few(0, len(texts), context, "or give more text")
        generator = random.Random(derive_seed(context.seed, "window"))  # noqa: S311
        starts = [generator.randint(0, last) for _ in range(context.count)]
        return Packed(
            [ids[start : start + context.seqlen] for start in starts],
            list(starts),
            len(texts),
            truncated=0,
            facts={"windows": last + 1, "read_whole": whole},
        )

    def windows(self, texts: Sequence[str], context: Context, joiner: str) -> int:
        """Return what is asked, as any place serves any number of times, or 0 for too little."""
        enough = len(encode(context.tokenizer, joiner.join(texts))) >= context.seqlen
        return context.count if enough else 0
