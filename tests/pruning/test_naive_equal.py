"""Presets and parts against naive float64 formulations that share nothing with the package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.pruning.allocations.base import LayerFacts, meet_budget
from lm_calib_plugin.pruning.allocations.owl import OWL
from lm_calib_plugin.pruning.obs import gram_factor, sweep
from lm_calib_plugin.pruning.parts import Selection, Strength
from lm_calib_plugin.pruning.scores.admm import ADMM
from lm_calib_plugin.pruning.scores.wanda import Wanda
from lm_calib_plugin.pruning.updates.admm import ADMMUpdate
from lm_calib_plugin.pruning.updates.bias import Bias
from lm_calib_plugin.pruning.updates.obs import OBS
from lm_calib_plugin.statistics import STATISTICS, LayerStats, Moments
from tests.methods import method_of

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import naive_methods
import naive_pruning

PATTERNS = [None, (1, 4), (2, 4), (4, 8), (3, 5)]
TOKENS = [70, 50, 30]  # of each sequence


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(kind: str) -> tuple[Tensor, Tensor]:
    """Return a weight ``[out, in]`` and correlated inputs with a mean, ``[tokens, in]``."""
    rows, width = {"one row": (1, 40), "two blocks": (5, 160)}.get(kind, (12, 40))
    weight = normal(rows, width, seed=len(kind))
    mix = torch.eye(width) + 0.4 * normal(width, width, seed=7) / width**0.5
    x = normal(sum(TOKENS), width, seed=8) @ mix * torch.logspace(-0.5, 0.5, width)
    x += 0.3 * normal(width, seed=9)
    if kind == "dead columns":
        x[:, [0, 3, 4, 39]] = 0.0
    if kind == "ties":
        weight = weight.mul(2).round()
        x = normal(sum(TOKENS), width, seed=8).sign()
    return weight, x


def tallies(x: Tensor) -> Tensor:
    x = x.double()
    one = torch.ones(x.shape[1], dtype=torch.float64)
    return torch.stack([x.sum(0), x.square().sum(0), one * len(x), one * len(TOKENS)])


def remember(kind: str, x: Tensor) -> LayerStats | None:
    if kind == "none":
        return None
    stats = STATISTICS[kind].empty(x.shape[1])
    for rows in x.split(TOKENS):
        stats.update(rows)
    return stats


def gram(x: Tensor) -> Tensor:
    return x.double().t() @ x.double()


def squares(x: Tensor) -> Tensor:
    return x.double().square().sum(0)


def error(x: Tensor, before: Tensor, after: Tensor) -> float:
    return float((x.double() @ (before - after).double().t()).square().sum())


# Method with its stages, the naive function, and what that one looks at.
CASES: dict[str, tuple[dict[str, str], Callable[..., Tensor], Callable[[Tensor], Any] | None]] = {
    "magnitude": ({}, naive_methods.magnitude, None),
    "wanda": ({}, naive_methods.wanda, squares),
    "ria": ({}, naive_pruning.ria, squares),
    "wanda+wanda_variant": ({"score": "wanda_variant"}, naive_pruning.wanda_variant, squares),
    "sparsegpt": ({}, naive_methods.sparsegpt, gram),
    "dsnot": ({}, naive_pruning.dsnot, tallies),
    "admm": ({}, naive_pruning.admm, gram),
}
# Where nothing is rounded on the way to a mask but the scores themselves, ties are resolved alike.
TIED = ("magnitude", "wanda", "dsnot")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "one row", "two blocks", "dead columns", "ties"])
@pytest.mark.parametrize("name", CASES)
def test_method_equals_its_naive_formulation(
    name: str, kind: str, pattern: tuple[int, int] | None
) -> None:
    if kind == "ties" and name not in TIED:
        return
    stages, naive, look = CASES[name]
    weight, x = layer(kind)
    share = 0.55 if pattern is None else 1 - pattern[0] / pattern[1]
    strength: dict[str, Any] = {"sparsity": share}
    if pattern:
        strength = {"pattern": f"{pattern[0]}:{pattern[1]}"}
    method = method_of(name.partition("+")[0], **strength, **stages)
    result = method.compress(weight, remember(method.statistic, x)).weight
    seen = [look(x)] if look else []
    expected = naive(weight, *seen, share, pattern)
    assert torch.equal(result == 0, expected == 0)
    torch.testing.assert_close(result, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "one row", "two blocks", "dead columns"])
def test_alps_finds_the_support_of_its_naive_formulation(
    kind: str, pattern: tuple[int, int] | None
) -> None:
    weight, x = layer(kind)
    share = 0.55 if pattern is None else 1 - pattern[0] / pattern[1]
    mask = naive_pruning.alps_mask(weight, gram(x), share, pattern)
    expected = naive_pruning.refit(weight, gram(x), mask)
    found = ADMM().select(weight, remember("gram", x), Strength(share, pattern))
    # Forty rounds of choosing in float32 and in float64: a tie may be decided differently.
    assert int((found.keep == mask).sum()) <= 2
    refit = naive_pruning.refit(weight, gram(x), ~found.keep)
    assert error(x, weight, refit) == pytest.approx(error(x, weight, expected), rel=2e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("score", ["admm", "wanda"])
def test_pcg_comes_close_to_exact_least_squares(
    score: str, pattern: tuple[int, int] | None
) -> None:
    naive = {"admm": naive_pruning.alps, "wanda": naive_pruning.wanda_refit}[score]
    weight, x = layer("two blocks")
    share = 0.55 if pattern is None else 1 - pattern[0] / pattern[1]
    strength = {"pattern": f"{pattern[0]}:{pattern[1]}"} if pattern else {"sparsity": share}
    result = method_of("alps", **strength, score=score).compress(weight, remember("gram", x)).weight
    best = error(x, weight, naive(weight, gram(x), share, pattern))
    dropped = error(x, weight, weight * (result != 0))
    assert best * 0.99 <= error(x, weight, result) <= best + 0.05 * (dropped - best)


# --- updates on a given mask -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "one row", "two blocks"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_obs_on_the_mask_of_sparsegpt_is_sparsegpt(
    pattern: tuple[int, int] | None, kind: str
) -> None:
    weight, x = layer(kind)
    stats, strength = remember("gram", x), Strength(0.55, pattern)
    swept, keep = sweep(weight, gram_factor(stats, 0.01, weight.device), strength)
    found = OBS().update(weight, Selection(keep), stats, strength).values(weight)
    torch.testing.assert_close(found, swept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "one row", "dead columns"])
@pytest.mark.parametrize("seed", range(3))
def test_obs_on_any_mask_is_the_surgeon_with_one_weight_at_a_time(kind: str, seed: int) -> None:
    weight, x = layer(kind)
    weight, x = weight[:4], x[:, :16]
    weight = weight[:, :16]
    keep = normal(*weight.shape, seed=seed + 20) > 0
    expected = naive_pruning.obs_on(weight, gram(x), ~keep)
    found = OBS().update(weight, Selection(keep), remember("gram", x), Strength(0.5))
    torch.testing.assert_close(found.values(weight), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "one row", "dead columns", "two blocks"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_admm_on_any_mask_equals_its_naive_formulation(
    pattern: tuple[int, int] | None, kind: str
) -> None:
    weight, x = layer(kind)
    keep = Strength(0.6, pattern).keep(normal(*weight.shape, seed=30).abs(), "row")
    expected = naive_pruning.admm(weight, gram(x), 0.6, pattern, given=~keep)
    found = ADMMUpdate().update(
        weight, Selection(keep), remember("gram", x), Strength(0.6, damp=0.1)
    )
    assert found.solved == "admm?rho=1&steps=20"
    torch.testing.assert_close(found.values(weight), expected, rtol=1e-3, atol=1e-4)
    assert error(x, weight, found.values(weight)) < error(x, weight, weight * keep)


@pytest.mark.parametrize("kind", ["plain", "one row", "dead columns"])
def test_bias_is_the_least_squares_change_of_the_bias(kind: str) -> None:
    weight, x = layer(kind)
    stats = remember("spread", x)
    keep = Strength(0.6).keep(Wanda().scores(weight, stats), "row")
    found = Bias().update(weight, Selection(keep), stats, Strength(0.6))
    lost = x.double() @ (weight * ~keep).double().t()  # what the outputs lack, [tokens, out]
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(ones, lost).solution[0]
    assert found.bias is not None
    torch.testing.assert_close(found.bias.double(), expected, rtol=1e-4, atol=1e-5)
    assert float((lost - found.bias).square().sum()) < float(lost.square().sum())
    assert torch.equal(found.values(weight), weight * keep)


# --- allocation --------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_owl_equals_its_naive_formulation(sparsity: float) -> None:
    shapes = [(0, (8, 40)), (0, (16, 20)), (1, (8, 40)), (2, (8, 40)), (2, (30, 40)), (3, (9, 20))]
    layers, scores = [], {}
    for number, (block, shape) in enumerate(shapes):
        weight = normal(*shape, seed=number) * (1 + normal(*shape, seed=number + 50).square())
        x = normal(60, shape[1], seed=number + 90) * torch.logspace(-1, 1, shape[1])
        stats = Moments.empty(shape[1])
        stats.update(x)
        fact = LayerFacts(f"{block}.{number}", block, shape, lambda w=weight: w, stats)
        layers.append(fact)
        own = weight.double().abs() * squares(x).sqrt()
        scores[block] = torch.cat([scores.get(block, own[:0].flatten()), own.flatten()])
    wanted = OWL().fractions(layers, sparsity, Wanda())
    met = meet_budget([float(w) for w in wanted], [fact.size for fact in layers], sparsity)
    expected = naive_pruning.owl_fractions(list(scores.values()), sparsity)
    assert len(set(expected)) == 4
    for fact, share in zip(layers, met, strict=True):
        assert share == pytest.approx(expected[fact.block], abs=1e-9)
