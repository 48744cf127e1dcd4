"""``zip``: the widest vocabulary, by greedy cover of distinct tokens (ZipCal, arXiv 2603.16105).

Tokens count as text, in lower case and without white space around. Of a larger pool 2,000
candidates, drawn anew, are looked at in every step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.features import Features
from lm_calib_plugin.calibration.selectors.greedy import greedy_cover

PER_STEP = 2000


class ZipWords(Selector):
    """Each step takes the candidate with the most tokens not seen yet."""

    needs = frozenset({"words"})
    paper = "https://arxiv.org/abs/2603.16105"

    def select(
        self, candidates: Sequence[Tensor], count: int, features: Features, seed: int
    ) -> list[int]:
        """Cover; when every token is covered, begin again."""
        generator = random.Random(derive_seed(seed, "zip"))  # noqa: S311

        def look_at(places: list[int]) -> list[int]:
            return places if len(places) <= PER_STEP else generator.sample(places, PER_STEP)

        words = features.words
        chosen, covers = greedy_cover(words, count, look_at=look_at)
        self.facts = {
            "distinct_tokens_of_the_pool": len(frozenset().union(*words)),
            "distinct_tokens_chosen": len(frozenset().union(*(words[i] for i in chosen))),
            "covers": covers,
        }
        return chosen
