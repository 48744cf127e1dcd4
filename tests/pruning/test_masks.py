"""Selection against its definition: sort, then count."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm_calib_plugin.pruning import masks
from lm_calib_plugin.pruning.masks import (
    keep_by_threshold,
    keep_highest,
    keep_n_of_m,
    ranked,
    removed_count,
)

# Few distinct values, so that ties are the rule.
small = st.integers(0, 3).map(float)


@pytest.mark.parametrize(
    ("size", "sparsity", "count"),
    [
        (100, 0.29, 29),
        (100, 0.57, 57),
        (100, 0.58, 58),
        (1000, 0.07, 70),
        (10, 0.7, 7),
        (10, 0.1, 1),
        (3, 0.3333333333333333, 0),
        (3, 0.34, 1),
        (7, 0.0, 0),
        (1, 0.999999, 0),
        (4096 * 11008, 0.6, 27053260),
        (10**9, 1e-9, 1),
    ],
)
def test_count_is_that_of_the_decimal_that_was_typed(
    size: int, sparsity: float, count: int
) -> None:
    assert removed_count(size, sparsity) == count


@given(st.integers(1, 10**10), st.integers(0, 9999))
def test_count_equals_decimal_arithmetic(size: int, thousandths: int) -> None:
    typed = Decimal(thousandths) / 10000
    count = removed_count(size, float(typed))
    assert count == int(typed * size)
    assert 0 <= count < size or count == 0


def lowest_first(line: list[float]) -> list[int]:
    """Indices by rising score; among equal scores the lower index comes first."""
    return sorted(range(len(line)), key=lambda i: (line[i], i))


@given(st.lists(st.lists(small, min_size=9, max_size=9), min_size=1, max_size=4), st.integers(0, 9))
def test_lowest_scores_go_and_ties_go_by_index(rows: list[list[float]], removed: int) -> None:
    mask = keep_highest(torch.tensor(rows), removed)
    for line, kept in zip(rows, mask.tolist(), strict=True):
        assert {i for i in range(9) if not kept[i]} == set(lowest_first(line)[:removed])


@given(
    st.lists(st.floats(0, 1, width=32), min_size=12, max_size=12),
    st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (2, 3), (4, 6), (1, 6), (5, 12), (11, 12)]),
)
def test_n_of_m_keeps_the_n_highest_of_every_m(line: list[float], pattern: tuple[int, int]) -> None:
    keep, group = pattern
    for scores in (line, [round(x * 2) / 2 for x in line]):
        mask = keep_n_of_m(torch.tensor([scores, scores[::-1]]), keep, group).tolist()
        for row, kept in zip((scores, scores[::-1]), mask, strict=True):
            for start in range(0, 12, group):
                gone = {i for i in range(group) if not kept[start + i]}
                assert gone == set(lowest_first(row[start : start + group])[: group - keep])


@given(st.lists(small, min_size=1, max_size=30), st.floats(0, 0.999))
def test_threshold_rule_is_that_of_the_published_code(line: list[float], sparsity: float) -> None:
    threshold = sorted(line)[int(len(line) * sparsity)]
    expected = [score > threshold for score in line]
    assert keep_by_threshold(torch.tensor([line]), sparsity).tolist() == [expected]


def test_groups_of_n_of_m_run_along_the_inputs() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    expected = [[False, True, False, True], [True, False, True, False]]
    assert keep_n_of_m(scores, 1, 2).tolist() == expected


def test_scores_are_left_as_they_are() -> None:
    scores = torch.rand(4, 8)
    before = scores.clone()
    keep_highest(scores, 3)
    keep_by_threshold(scores, 0.5)
    keep_n_of_m(scores, 2, 4)
    assert torch.equal(scores, before)


@given(
    st.lists(st.lists(small | st.just(-0.0), min_size=7, max_size=7), min_size=1, max_size=5),
    st.integers(1, 7),
    st.sampled_from([1.0, -1.0, 0.25]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_rank_is_that_of_a_full_sort(
    rows: list[list[float]], rank: int, sign: float, dtype: torch.dtype
) -> None:
    scores = torch.tensor(rows).mul(sign).to(dtype)
    expected = scores.sort(dim=1).values[:, rank - 1 : rank]
    assert (ranked(scores, rank) == expected).all()
    assert (ranked(scores.t().contiguous().t(), rank) == expected).all()


@pytest.mark.parametrize("rank", [1, 2, 50, 51, 99, 100])
def test_ranks_by_topk(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-20, 20, (3, 100), generator=generator).float()
    assert torch.equal(masks.by_topk(scores, rank), scores.sort(dim=1).values[:, rank - 1, None])
