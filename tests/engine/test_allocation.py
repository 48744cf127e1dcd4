"""Allocations on whole models: what is removed, counted on the live weights."""

from __future__ import annotations

from typing import Any

import pytest

from lm_calib_plugin import compress
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import Recipe
from tests.engine.test_walk import QUIET, calibration
from tests.tiny import make_model


def zeros(**options: Any) -> tuple[int, dict[int, tuple[int, int]], Any]:
    """Return all zeros, zeros and weights of each block, and the report."""
    model = make_model()
    report = compress(model, None, Recipe(heldout=0, **options), QUIET, calibration())
    found = {}
    for index, block in enumerate(model.model.layers):
        weights = [
            m.weight for m in block.modules() if hasattr(m, "weight") and m.weight.dim() == 2
        ]
        found[index] = (sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights))
    return sum(z for z, _ in found.values()), found, report


@pytest.mark.parametrize("allocation", ["owl?lambda=0.2", "atp"])
@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_as_many_weights_go_as_with_uniform(allocation: str, score: str) -> None:
    uniform, flat, _ = zeros(method=score, sparsity=0.6)
    moved, blocks, report = zeros(method=score, sparsity=0.6, allocation=allocation)
    assert blocks != flat
    rows = min(row.shape[0] for row in report.layers) if score == "wanda" else 1
    assert uniform - rows < moved <= uniform
    for row in report.layers:
        size = row.shape[1] if score == "wanda" else row.shape[0] * row.shape[1]
        assert row.removed == int(float(row.asked) * size + 1e-6) / size


def test_owl_is_owl_with_a_second_order_score() -> None:
    _, _, plain = zeros(method="owl", sparsity=0.6)
    _, _, second = zeros(method="owl_sparsegpt", sparsity=0.6)
    assert plain.recipe["allocation"] == second.recipe["allocation"] == "owl?m=5.0&lambda=0.08"
    asked = {row.name: row.asked for row in second.layers}
    for row in plain.layers:
        # Rounded to counts of a row here, not there.
        assert float(row.asked) == pytest.approx(float(asked[row.name]), abs=1 / row.shape[1])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_whole_numbers_of_every_m(method: str) -> None:
    total, _, report = zeros(
        method=method, pattern="4:8", allocation="owl?lambda=0.3", ignore="down_proj"
    )
    assert total == sum(row.shape[0] * row.shape[1] for row in report.layers) // 2
    assert len({row.asked for row in report.layers}) > 1
    for row in report.layers:
        keep, of = map(int, str(row.asked).split(":"))
        assert (of, row.removed) == (8, 1 - keep / 8)


def test_list_gives_every_block_its_fraction() -> None:
    fractions = [0.25, 0.5, 0.75]
    options = {"name": "list", "fractions": fractions}
    _, _, report = zeros(method="magnitude", allocation=options)
    for row in report.layers:
        assert row.removed == pytest.approx(fractions[int(row.name.split(".")[2])], abs=1e-3)
    sizes = [row.shape[0] * row.shape[1] for row in report.layers]
    expected = sum(row.asked * n for row, n in zip(report.layers, sizes, strict=True)) / sum(sizes)
    assert report.recipe["sparsity"] == pytest.approx(expected)
    # Nothing for the first block, and a pattern for the others.
    _, _, mixed = zeros(method="wanda", pattern="2:4", allocation="list?fractions=0+0.5+0.75")
    assert {(row.name.split(".")[2], row.removed) for row in mixed.layers} == {
        ("0", 0.0),
        ("1", 0.5),
        ("2", 0.75),
    }


def test_a_list_and_a_sparsity_have_to_agree() -> None:
    with pytest.raises(UserError, match=r"the listed fractions remove 0\.5"):
        zeros(method="magnitude", sparsity=0.7, allocation="list?fractions=0.5+0.5+0.5")


def test_global_removes_the_count_over_all_layers() -> None:
    total, _, report = zeros(method="wanda", sparsity=0.37, allocation="global")
    sizes = sum(row.shape[0] * row.shape[1] for row in report.layers)
    assert total == sizes * 37 // 100
    with pytest.raises(UserError, match="group=row"):
        zeros(method="wanda", sparsity=0.5, allocation="global", group="row")
    with pytest.raises(UserError, match="got 2:4"):
        zeros(method="wanda", pattern="2:4", allocation="global")


def test_nothing_is_allocated_where_nothing_is_removed() -> None:
    total, _, report = zeros(method="owl", sparsity=0.0)
    assert total == 0
    assert {row.asked for row in report.layers} == {None}


def test_one_point_of_the_grid_has_one_key() -> None:
    _, _, by_name = zeros(method="owl", sparsity=0.5)
    _, _, by_stage = zeros(method="magnitude", score="wanda", allocation="owl?m=5", sparsity=0.5)
    _, _, other = zeros(method="owl", sparsity=0.5, allocation="owl?m=3")
    assert by_name.key == by_stage.key != other.key
    assert by_name.weights_digest == by_stage.weights_digest
