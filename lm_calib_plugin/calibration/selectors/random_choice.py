"""``random``: uniform without replacement, the baseline of every selector."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.features import Features


class RandomChoice(Selector):
    """Every set of ``count`` candidates is equally likely."""

    def select(
        self, candidates: Sequence[Tensor], count: int, features: Features, seed: int
    ) -> list[int]:
        """Draw with an own generator."""
        generator = random.Random(derive_seed(seed, "random"))  # noqa: S311
        return generator.sample(range(len(candidates)), count)
