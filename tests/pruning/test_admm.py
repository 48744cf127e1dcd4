"""Masks and weights by alternating directions, against float64 and exact solutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.errors import NumericalError, UserError
from lm_calib_plugin.pruning.admm import inverse, unit_gram
from lm_calib_plugin.pruning.parts import Selection, Strength
from lm_calib_plugin.pruning.scores.admm import ADMM
from lm_calib_plugin.statistics import Gram, Moments


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(width: int, count: int | None = None, seed: int = 1) -> Tensor:
    mix = torch.eye(width) + 0.5 * normal(width, width, seed=seed + 100) / width**0.5
    return normal(count or 4 * width, width, seed=seed) @ mix * torch.logspace(-0.5, 0.5, width)


def gram_of(x: Tensor) -> Gram:
    stats = Gram.empty(x.shape[1])
    stats.update(x)
    return stats


def error(x: Tensor, before: Tensor, after: Tensor) -> float:
    return float((x.double() @ (before - after).double().t()).square().sum())


def best_on(keep: Tensor, weight: Tensor, x: Tensor, damp: float) -> Tensor:
    """Least squares on the support of every row, ridge pulling to the dense weight, float64."""
    gram = x.double().t() @ x.double()
    gram += damp * gram.diagonal().mean() * torch.eye(len(gram))
    found = torch.zeros_like(weight, dtype=torch.float64)
    for i, mask in enumerate(keep):
        right = gram[mask] @ weight[i].double()
        found[i, mask] = torch.linalg.solve(gram[mask][:, mask], right)
    return found


@pytest.mark.parametrize("options", [{}, {"group": "row"}, {"group": "block128"}], ids=str)
def test_alps_removes_exactly_what_is_asked(options: dict) -> None:
    weight, x = normal(7, 150), inputs(150)
    keep = ADMM().select(weight, gram_of(x), Strength(0.37, **options)).keep
    if options == {"group": "row"}:
        assert ((~keep).sum(1) == 55).all()
    elif options:
        assert [int((~part).sum()) for part in keep.split(128, dim=1)] == [331, 56]
    else:
        assert int((~keep).sum()) == 388


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("pattern", [None, (2, 4), (3, 5)], ids=str)
def test_alps_values_are_close_to_the_best_on_their_support(
    pattern: tuple[int, int] | None, compat: str | None
) -> None:
    weight, x = normal(16, 60), inputs(60)
    share = 0.6 if pattern is None else 1 - pattern[0] / pattern[1]
    found = ADMM().select(weight, gram_of(x), Strength(share, pattern, compat=compat))
    assert found.solved == "admm_alps"
    assert found.damp == 0.01
    best = error(x, weight, best_on(found.keep, weight, x, 0.01))
    reached = error(x, weight, found.values(weight))
    dropped = error(x, weight, weight * found.keep)
    assert best * 0.999 <= reached <= best * 1.05
    assert reached < 0.8 * dropped


def test_alps_support_is_better_than_that_of_single_scores() -> None:
    for seed in range(4):
        weight, x = normal(16, 64, seed=seed), inputs(64, seed=seed + 10)
        stats, strength = gram_of(x), Strength(0.7)
        found = ADMM().select(weight, stats, strength).keep
        wanda = strength.keep(weight.abs() * stats.energy().sqrt(), "layer")
        errors = [error(x, weight, best_on(keep, weight, x, 0.01)) for keep in (found, wanda)]
        assert errors[0] < 0.9 * errors[1]


def test_alps_with_nothing_to_remove_leaves_the_weight_alone() -> None:
    weight, x = normal(3, 8), inputs(8)
    found = ADMM().select(weight, gram_of(x), Strength(0.0))
    assert found == Selection(found.keep, damp=0.01)
    assert torch.equal(found.values(weight), weight)


def test_alps_keeps_values_in_front_of_silent_inputs() -> None:
    weight, x = normal(4, 20), inputs(20)
    x[:, [3, 7]] = 0.0
    found = ADMM().select(weight, gram_of(x), Strength(0.05))  # 4 of 80; 8 are silent
    assert not found.keep[:, [3, 7]].all()
    assert int((~found.keep).sum()) == int((~found.keep[:, [3, 7]]).sum()) == 4
    # Nothing that matters went, so nothing has to be made up for.
    torch.testing.assert_close(found.values(weight)[:, :3], weight[:, :3], rtol=1e-4, atol=1e-5)


def test_alps_options_are_checked() -> None:
    with pytest.raises(UserError, match="rho"):
        ADMM(rho=0.0)
    with pytest.raises(UserError, match="steps"):
        ADMM(steps=0)


def test_unit_gram_has_a_diagonal_of_ones_and_keeps_correlations() -> None:
    x = inputs(6)
    x[:, 4] = 0.0
    found = unit_gram(gram_of(x), torch.device("cpu"))
    live = [0, 1, 2, 3, 5]
    expected = torch.eye(6)
    norms = x[:, live].double().norm(dim=0)
    expected[torch.tensor(live)[:, None], live] = (
        x[:, live].double().t() @ x[:, live].double() / norms / norms[:, None]
    ).float()
    torch.testing.assert_close(found.matrix, expected, rtol=1e-5, atol=1e-6)
    assert found.dead.tolist() == [False] * 4 + [True, False]
    weight = normal(3, 6)
    restored = found.restored(found.scaled(weight), weight)
    torch.testing.assert_close(restored, weight)


def test_inverse_falls_back_on_float64_and_then_says_so() -> None:
    equal = torch.ones(2, 2)  # two equal channels; 1 + 1e-8 is 1 in float32
    shifted = equal.double() + 1e-8 * torch.eye(2, dtype=torch.float64)
    expected = torch.linalg.inv(shifted)
    torch.testing.assert_close(inverse(equal, 1e-8).double(), expected, rtol=1e-6, atol=0)
    with pytest.raises(NumericalError, match="not positive definite"):
        inverse(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.5)


def test_other_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="Gram"):
        unit_gram(Moments.empty(4), torch.device("cpu"))
