"""How much goes where: published rules, exact budgets."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.part import make_part
from lm_calib_plugin.pruning.allocations.base import LayerFacts, apportion, meet_budget
from lm_calib_plugin.statistics import Moments

WANDA = make_part("score", "wanda")


def facts(block: int, shape: tuple[int, int], seed: int, heavy: float = 0.0) -> LayerFacts:
    """A layer of a block; ``heavy`` is the fraction of its inputs with large energy."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    stats = Moments.empty(shape[1])
    scale = torch.ones(shape[1])
    scale[: int(heavy * shape[1])] = 30.0
    stats.update(torch.randn(50, shape[1], generator=generator) * scale)
    return LayerFacts(f"b{block}.{seed}", block, shape, weight.clone, stats.per_token())


LAYERS = [
    facts(0, (16, 40), 0, 0.05),
    facts(0, (8, 60), 1),
    facts(1, (16, 40), 2, 0.1),
    facts(1, (24, 60), 3, 0.1),
    facts(2, (16, 40), 4),
    facts(2, (8, 60), 5, 0.02),
]


def wanda_scores(layer: LayerFacts) -> Tensor:
    assert layer.stats is not None
    return layer.read().double().abs() * layer.stats.energy().double().sqrt()


def shares(text: str, sparsity: float, layers: list[LayerFacts] = LAYERS) -> list[Any]:
    found: list[Any] = make_part("allocation", text).fractions(layers, sparsity, WANDA)
    return found


def test_owl_is_the_map_of_the_paper() -> None:
    outliers = []
    for block in range(3):
        one = torch.cat([wanda_scores(x).flatten() for x in LAYERS if x.block == block])
        outliers.append(100 * float((one > 5 * one.mean()).double().mean()))
    low, high = min(outliers), max(outliers)
    kept = [(d - low) / (high - low) * 0.16 for d in outliers]
    found = shares("owl", 0.7)
    for layer, share in zip(LAYERS, found, strict=True):
        # Equal up to one shift, which the budget decides.
        assert share - found[0] == pytest.approx(kept[0] - kept[layer.block])


def test_owl_treats_equal_blocks_alike() -> None:
    same = [facts(b, (4, 8), 3) for b in range(3)]
    assert shares("owl", 0.7, same) == [0.7] * 3


def test_atp_is_an_arithmetic_progression() -> None:
    found = shares("atp?beta=0.05", 0.6)
    assert found == pytest.approx([0.55, 0.55, 0.6, 0.6, 0.65, 0.65])
    wide = shares("atp", 0.6)
    assert wide[-1] - wide[0] == pytest.approx(0.16)


def test_list_is_taken_as_it_is() -> None:
    assert shares("list?fractions=0.1+0.2+0.3", 0.9) == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    with pytest.raises(UserError, match="got 2 fractions for 3 blocks"):
        shares("list?fractions=0.1+0.2", 0.9)


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9])
def test_global_is_one_sort_of_everything(sparsity: float) -> None:
    found = shares("global", sparsity)
    everything = torch.cat([WANDA.scores(x.read(), x.stats).flatten() for x in LAYERS])
    owner = torch.cat([torch.full((x.size,), i) for i, x in enumerate(LAYERS)])
    count = int(Fraction(str(sparsity)) * everything.numel())
    gone = owner[everything.argsort(stable=True)[:count]]
    for i, (layer, share) in enumerate(zip(LAYERS, found, strict=True)):
        assert share == Fraction(int((gone == i).sum()), layer.size)


def test_global_removes_ties_of_earlier_layers_first() -> None:
    same = [LayerFacts(str(i), i, (2, 4), lambda: torch.ones(2, 4), None) for i in range(3)]
    found = make_part("allocation", "global").fractions(same, 0.5, make_part("score", "magnitude"))
    assert found == [1, Fraction(1, 2), 0]


def test_scores_without_a_common_scale_are_refused() -> None:
    rule = make_part("allocation", "global")
    with pytest.raises(UserError, match="no scores to compare between layers"):
        rule.fractions(LAYERS, 0.5, make_part("score", "sparsegpt"))


@given(
    wanted=st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=6),
    sparsity=st.floats(0, 0.98),
    seed=st.integers(0, 9),
)
def test_the_budget_is_met_by_number_of_weights(
    wanted: list[float], sparsity: float, seed: int
) -> None:
    sizes = [100 * (1 + (seed + i) % 4) for i in range(len(wanted))]
    found = meet_budget(wanted, sizes, sparsity)
    removed = sum(f * n for f, n in zip(found, sizes, strict=True))
    assert removed == pytest.approx(sparsity * sum(sizes), abs=1e-6 * sum(sizes))
    assert all(0 <= f <= max(0.99, sparsity) for f in found)
    free = [(f, w) for f, w in zip(found, wanted, strict=True) if 0 < f < max(0.99, sparsity)]
    for (f, w), (g, v) in itertools.pairwise(free):
        assert f - g == pytest.approx(w - v, abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 5)), min_size=1, max_size=5))
def test_counts_are_as_near_to_the_total_as_can_be(rows: list[tuple[float, int]]) -> None:
    wanted, units = [w for w, _ in rows], [u for _, u in rows]
    total = int(sum(w * u for w, u in rows))
    counts = apportion(wanted, units, total, [9] * len(rows))
    used = sum(c * u for c, u in zip(counts, units, strict=True))
    assert used <= total
    for count, want, unit in zip(counts, wanted, units, strict=True):
        # Rounded up or down; a whole number but for rounding may go either way.
        assert abs(count - want) < 1 + 1e-6
        if count < int(want) + 1 and count < 9:
            assert total - used < unit
