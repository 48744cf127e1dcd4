"""``multilen``: windows of several lengths, each length with about as many tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from lm_calib_plugin.calibration.packers.base import Packed, Packer, too_few
from lm_calib_plugin.calibration.packers.concat import read_joined
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.sources.base import Context, Document
from lm_calib_plugin.calibration.tokens import encode_joined

LENGTHS = (256, 512, 1024, 2048)


class SeveralLengths(Packer):
    """Windows of the joined text that do not overlap, of several lengths in a seeded order.

    After MaCa (arXiv 2602.07465): as many tokens of each length, and every sequence counts alike,
    whatever its length. The number of sequences is the one asked; shorter ones are more of them.
    """

    def pack(self, documents: Iterable[Document], context: Context, joiner: str) -> Packed:
        """Read, lay the windows out in a seeded order with seeded gaps, cut."""
        ids, seen, whole = read_joined(documents, context, joiner)
        parts = numbers(context.count, context.seqlen)
        sizes = [length for length, number in parts.items() for _ in range(number)]
        gap = len(ids) - sum(sizes)
        if gap < 0:
            found = most(len(ids), context.seqlen)
            raise too_few(found, seen, context, "or give more text")
        generator = random.Random(derive_seed(context.seed, "window"))  # noqa: S311
        generator.shuffle(sizes)
        # Sorted gaps before each window make every layout without overlap equally likely.
        gaps = sorted(generator.randint(0, gap) for _ in sizes)
        starts = [gap + sum(sizes[:place]) for place, gap in enumerate(gaps)]
        mean = sum(sizes) / max(1, len(sizes))
        return Packed(
            [ids[start : start + size].tolist() for start, size in zip(starts, sizes, strict=True)],
            starts,
            seen,
            truncated=0,
            facts={"lengths": {str(k): v for k, v in parts.items()}, "read_whole": whole},
            weights=[mean / size for size in sizes],
        )

    def windows(self, texts: Sequence[str], context: Context, joiner: str) -> int:
        """Count the windows that the joined texts hold."""
        return most(len(encode_joined(context.tokenizer, texts, joiner)), context.seqlen)


def lengths(seqlen: int) -> list[int]:
    """Return 256, 512, 1,024 and 2,048 as far as ``seqlen`` goes; halvings of it below 512."""
    fitting = [length for length in LENGTHS if length <= seqlen]
    if len(fitting) > 1:
        return fitting
    return sorted({max(1, seqlen >> times) for times in range(len(LENGTHS))})


def numbers(count: int, seqlen: int) -> dict[int, int]:
    """Split ``count`` sequences over the lengths in proportion to ``1 / length``, exactly."""
    chosen = lengths(seqlen)
    total = sum(1 / length for length in chosen)
    exact = [count / length / total for length in chosen]
    found = [int(x + 1e-9) for x in exact]
    order = sorted(range(len(chosen)), key=lambda i: (found[i] - exact[i], i))
    for i in order[: count - sum(found)]:
        found[i] += 1
    return dict(zip(chosen, found, strict=True))


def most(tokens: int, seqlen: int) -> int:
    """Return how many sequences, with all smaller numbers, fit in so many tokens."""
    count = 0
    while sum(size * n for size, n in numbers(count + 1, seqlen).items()) <= tokens:
        count += 1
    return count
