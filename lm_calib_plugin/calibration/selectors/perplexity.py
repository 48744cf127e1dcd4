"""``ppl_low``, ``ppl_mid``, ``ppl_high``: a third of the pool by the dense model's perplexity.

Candidates are ranked by mean NLL per token (equal ones by place). Of ``n`` candidates the thirds
are the ranks ``[0, n // 3)``, ``[n // 3, n - n // 3)`` and ``[n - n // 3, n)``; a third smaller
than what is asked is widened, the middle one to both sides. ``count`` of it are drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.features import Features


class PerplexityBand(Selector):
    """Base of the three thirds; ``band`` is 0, 1 or 2."""

    needs = frozenset({"nll"})
    band: ClassVar[int] = 0

    def select(
        self, candidates: Sequence[Tensor], count: int, features: Features, seed: int
    ) -> list[int]:
        """Rank, cut the third out, draw."""
        nll = features.nll.tolist()
        ranked = sorted(range(len(nll)), key=lambda i: (nll[i], i))
        first, last = band_of(len(nll), count, self.band)
        inside = ranked[first:last]
        self.facts = {
            "ranks": [first, last],
            "nll": [round(nll[inside[0]], 6), round(nll[inside[-1]], 6)],
        }
        generator = random.Random(derive_seed(seed, "band"))  # noqa: S311
        return generator.sample(inside, count)


def band_of(total: int, count: int, band: int) -> tuple[int, int]:
    """Return the ranks ``[first, last)`` of a third of ``total``, of at least ``count``."""
    third = total // 3
    first, last = ((0, third), (third, total - third), (total - third, total))[band]
    missing = max(0, count - (last - first))
    first = max(0, first - (0, (missing + 1) // 2, missing)[band])
    return first, max(last, first + count)


class PerplexityLow(PerplexityBand):
    """The third that the model finds most likely."""

    band = 0


class PerplexityMiddle(PerplexityBand):
    """The third in the middle."""

    band = 1


class PerplexityHigh(PerplexityBand):
    """The third that the model finds least likely."""

    band = 2
