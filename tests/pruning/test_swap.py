"""Exchanges of weights against recomputed errors and exhaustive searches in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.pruning import swapping as module
from lm_calib_plugin.pruning.masks import keep_highest, keep_n_of_m
from lm_calib_plugin.pruning.swapping import swap_descent


def problem(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return a weight and the Gram matrix of correlated inputs, float64."""
    own = torch.Generator().manual_seed(seed)
    mix = torch.eye(width, dtype=torch.float64)
    mix += torch.randn(width, width, generator=own, dtype=torch.float64) / width**0.5
    x = torch.randn(3 * width, width, generator=own, dtype=torch.float64) @ mix
    x *= torch.logspace(-0.4, 0.4, width, dtype=torch.float64)
    return torch.randn(rows, width, generator=own, dtype=torch.float64), x.T @ x


def some_mask(weight: Tensor, kind: str, seed: int = 0) -> Tensor:
    """Return a mask by chance, so that there is much to gain."""
    scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    if kind == "row":
        return keep_highest(scores, weight.shape[1] // 2)
    if kind == "layer":
        return keep_highest(scores.reshape(1, -1), weight.numel() // 2).reshape(weight.shape)
    keep, group = map(int, kind.split(":"))
    return keep_n_of_m(scores, keep, group)


def n_of_m(kind: str) -> tuple[int, int] | None:
    return tuple(map(int, kind.split(":"))) if ":" in kind else None  # type: ignore[return-value]


def error(difference: Tensor, gram: Tensor) -> float:
    return float(difference @ gram @ difference)


def exchanges(keep: Tensor, group: int | None) -> list[tuple[int, int]]:
    """List all pairs (kept, removed) of a row, or of its groups."""
    kept = keep.nonzero()[:, 0].tolist()
    removed = (~keep).nonzero()[:, 0].tolist()
    pairs = itertools.product(kept, removed)
    return [(p, u) for p, u in pairs if group is None or p // group == u // group]


def after(row: Tensor, value: Tensor, gram: Tensor, pair: tuple[int, int], free: bool) -> Tensor:
    """Return the values after an exchange; the best value is that of least squares."""
    p, u = pair
    found = value.clone()
    found[p] = 0.0
    found[u] = row[u]
    if free:
        found[u] = 0.0
        found[u] = (gram @ (row - found))[u] / gram[u, u]
    return found


KINDS = ["row", "layer", "2:4", "1:4", "3:4", "4:8"]


@pytest.mark.parametrize("free", [False, True], ids=["dense", "best"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_exchange_is_the_best_of_all(kind: str, free: bool) -> None:
    weight, gram = problem(6, 16, 1)
    keep = some_mask(weight, kind)
    value = torch.where(keep, weight * (0.8 if free else 1.0), 0.0)
    group = n_of_m(kind)
    found = swap_descent(weight, keep, gram, 1, group, None, value if free else None)
    made = 0
    for i, row in enumerate(weight):
        before = error(row - value[i], gram)
        pairs = exchanges(keep[i], group[1] if group else None)
        trials = [after(row, value[i], gram, pair, free) for pair in pairs]
        lowest = min((error(row - trial, gram) for trial in trials), default=before)
        if lowest < before:
            made += 1
            best = next(t for t in trials if error(row - t, gram) == lowest)
            torch.testing.assert_close(found.weight[i], best)
        else:
            assert torch.equal(found.keep[i], keep[i])
    assert found.swaps == made > 0


@pytest.mark.parametrize("free", [False, True], ids=["dense", "best"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_the_end_no_exchange_gains(kind: str, free: bool) -> None:
    weight, gram = problem(6, 16, 2)
    keep = some_mask(weight, kind)
    group = n_of_m(kind)
    found = swap_descent(weight, keep, gram, 1000, group, None, weight if free else None)
    for i, row in enumerate(weight):
        reached = error(row - found.weight[i], gram)
        for pair in exchanges(found.keep[i], group[1] if group else None):
            trial = after(row, found.weight[i], gram, pair, free)
            assert error(row - trial, gram) >= reached * (1 - 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_error_falls_with_every_exchange_and_counts_stay(kind: str) -> None:
    weight, gram = problem(9, 32, 3)
    keep = some_mask(weight, kind)
    group = n_of_m(kind)
    before, swaps = weight * ~keep, 0
    before_error = ((before @ gram) * before).sum(1)
    for steps in range(1, 12):
        found = swap_descent(weight, keep, gram, steps, group, 8)
        removed = weight * ~found.keep
        reached = ((removed @ gram) * removed).sum(1)
        assert (reached <= before_error * (1 + 1e-12)).all()
        assert torch.equal(found.keep.sum(1), keep.sum(1))
        if group:
            assert (found.keep.view(-1, group[1]).sum(1) == group[0]).all()
        assert torch.equal(found.weight, torch.where(found.keep, weight, 0.0))
        assert swaps <= found.swaps <= steps * len(weight)
        before_error, swaps = reached, found.swaps
    assert swaps > 9


def test_few_steps_are_the_beginning_of_many() -> None:
    """A row that may make n exchanges differs from the start in at most n pairs."""
    weight, gram = problem(5, 24, 4)
    keep = some_mask(weight, "row")
    for steps in (1, 3, 7):
        found = swap_descent(weight, keep, gram, steps)
        turned = (found.keep & ~keep).sum(1)
        assert (turned <= steps).all()
        assert found.swaps >= int(turned.sum())


def test_tiny_rows_come_close_to_the_best_mask_of_all() -> None:
    weight, gram = problem(40, 8, 5)
    keep = some_mask(weight, "row")
    found = swap_descent(weight, keep, gram, 100, candidates=None)
    best, start, reached = 0.0, 0.0, 0.0
    for i, row in enumerate(weight):
        masks = [torch.tensor([j in gone for j in range(8)]) for gone in _choose(8, 4)]
        best += min(error(row * gone, gram) for gone in masks)
        start += error(row * ~keep[i], gram)
        reached += error(row * ~found.keep[i], gram)
    assert best * (1 - 1e-9) <= reached <= best + 0.1 * (start - best)


def _choose(size: int, count: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(size), count))


@pytest.mark.parametrize("candidates", [1, 2, 5, 64])
def test_a_shortlist_only_makes_exchanges_that_gain(candidates: int) -> None:
    weight, gram = problem(7, 40, 6)
    keep = some_mask(weight, "layer")
    found = swap_descent(weight, keep, gram, 300, candidates=candidates)
    start, reached = weight * ~keep, weight * ~found.keep
    before, now = (((x @ gram) * x).sum(1) for x in (start, reached))
    assert (now <= before).all()
    assert now.sum() < 0.8 * before.sum()
    assert torch.equal(found.keep.sum(1), keep.sum(1))


@pytest.mark.parametrize("kind", ["layer", "2:4"])
def test_rows_alone_and_in_small_tiles_give_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = problem(8, 32, 7)
    keep = some_mask(weight, kind)
    whole = swap_descent(weight, keep, gram, 50, n_of_m(kind))
    monkeypatch.setattr(module, "TILE", 3 * 1024)
    tiles = swap_descent(weight, keep, gram, 50, n_of_m(kind))
    assert torch.equal(whole.keep, tiles.keep)
    assert whole.swaps == tiles.swaps
    one = swap_descent(weight[3:4], keep[3:4], gram, 50, n_of_m(kind))
    assert torch.equal(whole.keep[3:4], one.keep)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
@pytest.mark.parametrize("free", [False, True])
def test_scale_of_the_gram_matrix_does_not_matter(factor: float, free: bool) -> None:
    weight, gram = problem(5, 24, 8)
    keep = some_mask(weight, "row")
    kept = weight if free else None
    one = swap_descent(weight, keep, gram, 30, kept=kept)
    other = swap_descent(weight, keep, gram * factor, 30, kept=kept)
    assert torch.equal(one.keep, other.keep)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("kind", ["row", "2:4"])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("correlated", [False, True])
def test_silent_inputs(kind: str, free: bool, correlated: bool) -> None:
    weight, gram = problem(4, 16, 9)
    gram = gram if correlated else gram.diagonal().diag()
    silent = [0, 5]
    gram[silent], gram[:, silent] = 0.0, 0.0
    keep = some_mask(weight, kind)
    keep[:, :8] = torch.tensor([1, 0, 1, 0, 0, 1, 0, 1], dtype=torch.bool)
    found = swap_descent(weight, keep, gram, 100, n_of_m(kind), None, weight if free else None)
    assert found.weight.isfinite().all()
    assert torch.equal(found.keep.sum(1), keep.sum(1))
    if not correlated:  # then removing a live weight costs, and a silent one gains nothing
        assert not found.keep[:, silent].any()


def test_nothing_to_exchange() -> None:
    weight, gram = problem(3, 8, 10)
    for keep in (torch.ones(3, 8, dtype=torch.bool), torch.zeros(3, 8, dtype=torch.bool)):
        for steps in (0, 10):
            found = swap_descent(weight, keep, gram, steps)
            assert torch.equal(found.keep, keep)
            assert found.swaps == 0
    keep = some_mask(weight, "row")
    found = swap_descent(weight, keep, torch.zeros_like(gram), 10)
    assert torch.equal(found.keep, keep)


def test_uncorrelated_inputs_end_in_the_mask_of_the_largest_terms() -> None:
    weight, _ = problem(6, 20, 11)
    energy = torch.logspace(-1, 1, 20, dtype=torch.float64)
    keep = some_mask(weight, "row")
    found = swap_descent(weight, keep, energy.diag(), 1000, candidates=3)
    assert torch.equal(found.keep, keep_highest(weight.square() * energy, 10))


def test_float32_and_arguments_stay() -> None:
    weight, gram = problem(10, 64, 13)
    keep = some_mask(weight, "row")
    arguments = [weight.float(), keep.clone(), gram.float(), (weight * 0.9).float()]
    copies = [a.clone() for a in arguments]
    found = swap_descent(*arguments[:3], steps=60, kept=arguments[3])
    assert found.weight.dtype == torch.float32
    assert found.swaps > 0
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))
