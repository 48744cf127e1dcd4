from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from lm_calib_plugin.calibration.guards import (
    Guards,
    all_but_highest,
    below_percentile,
    distinct_share,
    near_duplicates,
)
from lm_calib_plugin.calibration.text_cache import Written

OFF = Guards(drop=0.0, dedup=False, repetition=0.0)


def written(ids, perplexity=1.0, finished=True):
    return Written(" ".join(map(str, ids)), len(ids), finished, perplexity, ids=tuple(ids))


def reasons(guards, texts):
    return [text.dropped for text in guards.judge(texts, lambda text: text.ids)]


@pytest.mark.parametrize("seed", range(5))
def test_distinct_share_against_brute_force(seed):
    numbers = random.Random(seed)
    for length in (0, 3, 4, 5, 60):
        ids = [numbers.randrange(3) for _ in range(length)]
        grams = [tuple(ids[i : i + 4]) for i in range(length) if i + 4 <= length]
        distinct = [gram for i, gram in enumerate(grams) if gram not in grams[:i]]
        assert distinct_share(ids) == (len(distinct) / len(grams) if grams else 1.0)


def brute_force_duplicates(texts):
    stay: list[list[int]] = []
    gone = []
    for place, ids in enumerate(texts):
        passages = {tuple(ids[i : i + 13]) for i in range(len(ids) - 12)}
        known = [p for p in passages if any(_holds(other, p) for other in stay)]
        if ids in stay or (passages and len(known) >= len(passages) / 2):
            gone.append(place)
        else:
            stay.append(ids)
    return gone


def _holds(ids, passage):
    return any(tuple(ids[i : i + 13]) == passage for i in range(len(ids)))


def test_near_duplicates_against_brute_force():
    numbers = random.Random(1)
    pieces = [[numbers.randrange(400) for _ in range(numbers.randrange(8, 30))] for _ in range(12)]
    chosen = [numbers.choices(pieces, k=numbers.randrange(1, 4)) for _ in range(60)]
    texts = [[i for piece in text for i in piece] for text in chosen]
    found = near_duplicates(texts)
    assert found == brute_force_duplicates(texts)
    assert 5 < len(found) < 55


def test_the_earlier_of_two_texts_stays():
    text = list(range(40))
    assert near_duplicates([text, text, [1, 2], [1, 2], text[:20], [*range(100, 130)]]) == [1, 3, 4]
    half = [*range(26), *range(200, 226)]  # 14 of its 40 passages are known
    assert near_duplicates([text, half]) == []


def test_paper_percentile_is_that_of_numpy():
    """Strictly below; an independent formulation of the linear percentile beside NumPy's own."""
    numbers = random.Random(0)
    for count in (1, 2, 5, 6, 11, 100):
        scores = [numbers.choice([1.5, 2.0, numbers.random() * 9]) for _ in range(count)]
        ranked, place = sorted(scores), 0.8 * (count - 1)
        low = int(place)
        high = min(low + 1, count - 1)
        bound = ranked[low] + (ranked[high] - ranked[low]) * (place - low)
        assert bound == pytest.approx(np.percentile(scores, 80))
        assert below_percentile(scores, 0.2) == [
            i for i in range(count) if scores[i] < np.percentile(scores, 80)
        ]
    assert below_percentile([3.0] * 10, 0.2) == []  # none is strictly below
    assert len(below_percentile([float(i) for i in range(5000)], 0.2)) == 4000
    assert below_percentile([], 0.2) == []


def test_the_filter_drops_an_exact_number_and_later_texts_of_a_tie():
    assert sorted(all_but_highest([5, 1, 9, 3, 7, 9, 2, 4, 6, 8], 0.2)) == [0, 1, 3, 4, 6, 7, 8, 9]
    assert sorted(all_but_highest([1.0] * 10, 0.2)) == list(range(8))
    assert len(all_but_highest([1.0] * 9, 0.2)) == 8
    assert len(all_but_highest([1.0] * 9, 0.0)) == 9


def test_every_guard_names_its_reason_and_the_first_one_counts():
    fine = [written([10 * i + j for j in range(20)], perplexity=i) for i in range(1, 6)]
    texts = [
        *fine,
        written([], perplexity=None),
        written([7] * 20, finished=False),
        written([7] * 20),
        written([10 + j for j in range(20)]),
    ]
    guards = Guards(drop=0.2, finished=True)
    other = ["empty", "unfinished", "repetition", "near_duplicate"]
    assert reasons(guards, texts) == [""] * 4 + ["perplexity"] + other
    assert reasons(replace(guards, finished=False), texts)[6] == "repetition"
    assert reasons(OFF, texts) == [""] * 5 + ["empty"] + [""] * 3
    # What an earlier guard dropped neither counts for the fraction nor as an earlier text.
    assert reasons(Guards(drop=0.5), [texts[7], texts[7], *fine[:2]])[2:] == ["", "perplexity"]


def test_judging_again_gives_the_same_and_more_texts_may_change_the_filter_only():
    texts = [written([i * 30 + j for j in range(20)], perplexity=9.0 - i) for i in range(8)]
    once = Guards().judge(texts, lambda text: text.ids)
    assert Guards().judge(once, lambda text: text.ids) == once


def test_hashes_of_passages_are_the_same_in_every_process():
    """Otherwise which text is a duplicate could depend on the run."""
    code = "print(hash((1, 50000, 7)))"
    printed = {subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)}
    assert printed == {f"{hash((1, 50000, 7))}\n".encode()}
