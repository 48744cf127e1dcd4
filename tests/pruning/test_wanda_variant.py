"""The variant of Wanda: rows of different density, exact counts, and the published search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.statistics import Moments
from tests.methods import method_of


def problem(rows: int = 24, width: int = 50) -> tuple[Tensor, Moments]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    weight *= torch.rand(rows, width, generator=generator) ** torch.arange(rows)[:, None]
    stats = Moments.empty(width)
    stats.update(torch.randn(90, width, generator=generator) * torch.logspace(-1, 1, width))
    return weight, stats


def prune(weight: Tensor, stats: Moments, **options: object) -> Tensor:
    result: Tensor = (
        method_of("wanda", score="wanda_variant", **options).compress(weight, stats).weight
    )
    return result


def published_search(weight: Tensor, stats: Moments, sparsity: float) -> Tensor:
    """Bisection on the share of each row's sum, row by row and weight by weight; True: removed."""
    scores = (weight.double().abs() * stats.energy().double().sqrt()).tolist()
    low, high, share = 0.0, 0.8, 0.4
    while True:
        gone = []
        for row in scores:
            limit, total, last = share * sum(row), 0.0, -1.0
            for score in sorted(row):
                total += score
                if total <= limit:
                    last = score
            gone.append([score <= last for score in row])
        mask = torch.tensor(gone)
        removed = float(mask.double().mean())
        if abs(removed - sparsity) <= 1e-3 or high - low < 1e-3:
            return mask
        low, high = (low, share) if removed > sparsity else (share, high)
        share = (low + high) / 2


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.9])
def test_counts_are_exact_and_rows_differ(sparsity: float) -> None:
    weight, stats = problem()
    gone = prune(weight, stats, sparsity=sparsity) == 0
    assert int(gone.sum()) == int(1200 * sparsity)
    assert len(set(gone.sum(1).tolist())) > 5


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6])
def test_reference_is_the_published_search(sparsity: float) -> None:
    weight, stats = problem()
    result = prune(weight, stats, sparsity=sparsity, compat="reference")
    expected = published_search(weight, stats, sparsity)
    assert torch.equal(result == 0, expected)
    exact = prune(weight, stats, sparsity=sparsity) == 0
    # One share for all rows: of two of them, one mask holds the other.
    assert not (exact & ~expected).any() or not (expected & ~exact).any()


def test_reference_stops_at_four_fifths_of_the_sum() -> None:
    weight, stats = problem()
    theirs = prune(weight, stats, sparsity=0.99, compat="reference") == 0
    assert int(theirs.sum()) < 0.98 * 1200
    assert int((prune(weight, stats, sparsity=0.99) == 0).sum()) == 1188


@pytest.mark.parametrize(
    "options", [{"pattern": "2:4"}, {"sparsity": 0.4, "group": "row"}], ids=str
)
@pytest.mark.parametrize("compat", [None, "reference"])
def test_within_rows_it_is_plain_wanda(options: dict, compat: str | None) -> None:
    weight, stats = problem(width=52)
    plain = method_of("wanda", **options).compress(weight, stats).weight
    assert torch.equal(prune(weight, stats, compat=compat, **options), plain)


def test_equal_scores_go_row_after_row() -> None:
    weight, stats = torch.ones(3, 4), Moments.empty(4)
    gone = prune(weight, stats, sparsity=0.5) == 0  # six of twelve, shares 1/4, 2/4, 3/4 and 1
    assert gone.sum(1).tolist() == [2, 2, 2]
    gone = prune(weight, stats, sparsity=0.6) == 0  # one more
    assert gone.tolist() == [
        [True] * 3 + [False],
        [True] * 2 + [False] * 2,
        [True] * 2 + [False] * 2,
    ]


def test_rows_without_any_score_go_first() -> None:
    weight, stats = problem(4, 10)
    weight[2] = 0.0
    gone = prune(weight, stats, sparsity=0.25) == 0
    assert gone[2].all()
