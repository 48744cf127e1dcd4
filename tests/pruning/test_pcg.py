"""Masked conjugate gradients against a direct solve of every row in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.pruning.masks import keep_highest, keep_n_of_m
from lm_calib_plugin.pruning.refit import masked_pcg
from lm_calib_plugin.pruning.shrinkage import shrunk


def problem(
    rows: int, width: int, seed: int, tokens: int | None = None, spread: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Return a weight and correlated inputs, float64."""
    own = torch.Generator().manual_seed(seed)
    mix = torch.eye(width, dtype=torch.float64)
    mix += 0.5 * torch.randn(width, width, generator=own, dtype=torch.float64) / width**0.5
    x = torch.randn(tokens or 4 * width, width, generator=own, dtype=torch.float64) @ mix
    x *= torch.logspace(-spread, spread, width, dtype=torch.float64)
    return torch.randn(rows, width, generator=own, dtype=torch.float64), x


def masked(weight: Tensor, pattern: str, seed: int = 0) -> Tensor:
    own = torch.Generator().manual_seed(seed)
    scores = torch.rand(weight.shape, generator=own)
    if pattern == "row":
        return keep_highest(scores, weight.shape[1] // 2)
    if pattern == "layer":
        removed = int(weight.numel() * 0.7)
        return keep_highest(scores.reshape(1, -1), removed).reshape(weight.shape)
    keep, group = map(int, pattern.split(":"))
    return keep_n_of_m(scores, keep, group)


def solved(weight: Tensor, keep: Tensor, gram: Tensor) -> Tensor:
    """Solve the normal equations of every row."""
    found = torch.zeros_like(weight)
    for i, row in enumerate(weight):
        kept = keep[i].nonzero()[:, 0]
        if len(kept):
            found[i, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ row)
    return found


def errors(weight: Tensor, found: Tensor, gram: Tensor) -> Tensor:
    difference = weight - found
    return ((difference @ gram) * difference).sum(1)


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4", "1:4", "4:8"])
@pytest.mark.parametrize("start", ["dense", "other"])
def test_enough_steps_solve_every_row(pattern: str, start: str) -> None:
    weight, x = problem(7, 24, 1)
    keep, gram = masked(weight, pattern), x.T @ x
    first = None if start == "dense" else torch.flip(weight, (0,))
    result = masked_pcg(weight, keep, gram, 200, first, tolerance=0)
    torch.testing.assert_close(result.weight, solved(weight, keep, gram), rtol=1e-7, atol=1e-9)
    assert result.residual < 1e-9
    assert (result.weight[~keep] == 0).all()


def test_rows_that_keep_nothing_everything_or_one_weight() -> None:
    weight, x = problem(3, 12, 2)
    keep = torch.zeros(3, 12, dtype=torch.bool)
    keep[1], keep[2, 5] = True, True
    gram = x.T @ x
    result = masked_pcg(weight, keep, gram, 50, tolerance=0)
    assert (result.weight[0] == 0).all()
    assert torch.equal(result.weight[1], weight[1])
    best = gram[5] @ weight[2] / gram[5, 5]
    torch.testing.assert_close(result.weight[2, 5], best)


def test_error_falls_with_every_step() -> None:
    weight, x = problem(9, 40, 3, spread=1.5)
    keep, gram = masked(weight, "layer"), x.T @ x
    before = errors(weight, torch.where(keep, weight, 0.0), gram)
    for steps in range(1, 30):
        result = masked_pcg(weight, keep, gram, steps, tolerance=0)
        after = errors(weight, result.weight, gram)
        assert (after <= before * (1 + 1e-12)).all()
        assert result.steps == steps
        before = after


def test_a_step_is_what_the_textbook_says() -> None:
    """One step of steepest descent in the metric of the diagonal, row by row."""
    weight, x = problem(4, 10, 4)
    keep, gram = masked(weight, "row"), x.T @ x
    result = masked_pcg(weight, keep, gram, 1, tolerance=0)
    for i, row in enumerate(weight):
        kept = keep[i].nonzero()[:, 0]
        gradient = (gram @ torch.where(keep[i], 0.0, row))[kept]
        direction = gradient / gram.diagonal()[kept]
        length = gradient @ direction / (direction @ gram[kept][:, kept] @ direction)
        torch.testing.assert_close(result.weight[i, kept], row[kept] + length * direction)


def test_weights_of_inputs_without_energy_stay() -> None:
    weight, x = problem(5, 16, 5)
    x[:, [0, 7]] = 0.0
    keep, gram = masked(weight, "row"), x.T @ x
    start = weight * 1.5
    result = masked_pcg(weight, keep, gram, 100, start, tolerance=0)
    assert torch.equal(result.weight[:, [0, 7]], torch.where(keep, start, 0.0)[:, [0, 7]])
    live = [i for i in range(16) if i not in (0, 7)]
    expected = solved(weight[:, live], keep[:, live], gram[live][:, live])
    torch.testing.assert_close(result.weight[:, live], expected, rtol=1e-7, atol=1e-9)


def test_no_energy_at_all_changes_nothing() -> None:
    weight, _ = problem(3, 8, 6)
    keep = masked(weight, "row")
    result = masked_pcg(weight, keep, torch.zeros(8, 8, dtype=torch.float64), 10)
    assert torch.equal(result.weight, torch.where(keep, weight, 0.0))
    assert result.residual == 0


def test_rank_deficient_gram_with_shrinkage_has_the_solution_of_the_ridge() -> None:
    weight, x = problem(6, 32, 7, tokens=9)
    keep = masked(weight, "row")
    gram = shrunk(x.T @ x, 0.05)
    result = masked_pcg(weight, keep, gram, 300, tolerance=0)
    # Ordinary least squares on inputs and ridge stacked; the ridge pulls to the dense weights.
    ridge = (0.05 * (x * x).sum(0)).sqrt().diag()
    design = torch.cat([x, ridge])
    for i, row in enumerate(weight):
        kept = keep[i].nonzero()[:, 0]
        best = torch.linalg.lstsq(design[:, kept], design @ row).solution
        torch.testing.assert_close(result.weight[i, kept], best, rtol=1e-6, atol=1e-8)


def test_rank_deficient_gram_without_ridge_still_falls_to_the_lowest_error() -> None:
    weight, x = problem(6, 32, 8, tokens=9)
    keep, gram = masked(weight, "layer"), x.T @ x
    result = masked_pcg(weight, keep, gram, 100, tolerance=0)
    for i, row in enumerate(weight):
        kept = keep[i].nonzero()[:, 0]
        best = torch.linalg.lstsq(x[:, kept], x @ row, driver="gelsd").solution
        lowest = float((x @ row - x[:, kept] @ best).square().sum())
        found = float((x @ (row - result.weight[i])).square().sum())
        assert found <= lowest + 1e-9 * float((x @ row).square().sum())


def test_rows_do_not_disturb_each_other() -> None:
    weight, x = problem(8, 20, 9)
    keep, gram = masked(weight, "layer"), x.T @ x
    together = masked_pcg(weight, keep, gram, 30, tolerance=1e-3).weight
    for i in range(8):
        alone = masked_pcg(weight[i : i + 1], keep[i : i + 1], gram, 30, tolerance=1e-3).weight
        # A row alone stops at once; with others it may go on a little.
        assert errors(weight[i : i + 1], together[i : i + 1], gram) <= errors(
            weight[i : i + 1], alone, gram
        ) * (1 + 1e-12)
        close = errors(weight[i : i + 1], solved(weight, keep, gram)[i : i + 1], gram)
        assert errors(weight[i : i + 1], alone, gram) <= close * 1.02


def test_loose_tolerance_stops_early_and_tight_one_solves() -> None:
    weight, x = problem(8, 40, 10)
    keep, gram = masked(weight, "row"), x.T @ x
    loose, tight = (masked_pcg(weight, keep, gram, 100, tolerance=t) for t in (1e-2, 1e-12))
    assert loose.steps < tight.steps < 100
    assert loose.residual > tight.residual


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scale_of_the_gram_matrix_does_not_matter(factor: float) -> None:
    weight, x = problem(5, 20, 11)
    keep, gram = masked(weight, "2:4"), x.T @ x
    one = masked_pcg(weight, keep, gram, 12)
    other = masked_pcg(weight, keep, gram * factor, 12, heldout=None)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-9, atol=1e-12)


def test_scale_of_single_inputs_does_not_matter() -> None:
    weight, x = problem(5, 20, 12)
    scale = torch.logspace(-3, 3, 20, dtype=torch.float64)
    keep = masked(weight, "row")
    one = masked_pcg(weight, keep, x.T @ x, 9).weight
    x = x * scale
    other = masked_pcg(weight / scale, keep, x.T @ x, 9).weight
    torch.testing.assert_close(one, other * scale, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_held_out_error_is_never_above_that_of_the_start(seed: int) -> None:
    weight, x = problem(6, 32, 20 + seed, tokens=12)  # fewer tokens than inputs: will over-fit
    _, other = problem(1, 32, 30 + seed, tokens=40)
    keep, gram, judge = masked(weight, "row"), x.T @ x, other.T @ other
    start = torch.where(keep, weight, 0.0)
    result = masked_pcg(weight, keep, gram, 40, tolerance=0, heldout=judge, every=1)
    assert errors(weight, result.weight, judge).sum() <= errors(weight, start, judge).sum()
    iterates = [
        errors(weight, masked_pcg(weight, keep, gram, n, tolerance=0).weight, judge).sum()
        for n in range(1, 41)
    ]
    iterates.insert(0, errors(weight, start, judge).sum())
    lowest = min(range(41), key=lambda n: float(iterates[n]))
    assert result.chosen == lowest < 40
    torch.testing.assert_close(errors(weight, result.weight, judge).sum(), iterates[lowest])


def test_start_is_returned_bit_for_bit_when_nothing_is_better_on_held_out_inputs() -> None:
    weight, x = problem(4, 16, 40, tokens=6)
    keep = masked(weight, "row")
    gram = x.T @ x
    judge = shrunk(torch.eye(16, dtype=torch.float64), 0.0)
    start = torch.where(keep, weight, 0.0)  # the best there is for uncorrelated inputs
    result = masked_pcg(weight, keep, gram, 20, heldout=judge)
    assert result.chosen == 0
    assert torch.equal(result.weight, start)


def test_float32_comes_close_and_arguments_stay() -> None:
    weight, x = problem(10, 64, 41)
    keep, gram = masked(weight, "row"), shrunk(x.T @ x, 0.01)
    arguments = [weight.float(), keep.clone(), gram.float(), (weight * 0.9).float()]
    copies = [a.clone() for a in arguments]
    result = masked_pcg(arguments[0], arguments[1], arguments[2], 100, arguments[3])
    assert result.weight.dtype == torch.float32
    best = errors(weight, solved(weight, keep, gram), gram).sum()
    assert errors(weight, result.weight.double(), gram).sum() <= best * 1.001
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


def test_shrinkage_is_a_ridge_of_each_inputs_own_energy() -> None:
    _, x = problem(1, 6, 42)
    gram = x.T @ x
    found = shrunk(gram, 0.25)
    assert torch.equal(found, gram + 0.25 * gram.diagonal().diag())
    assert torch.equal(shrunk(gram, 0.0), gram)
