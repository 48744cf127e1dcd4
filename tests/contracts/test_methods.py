"""What every method owes to whoever calls it; a row in ``matrix.py`` buys all of this."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from decimal import Decimal
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.statistics import STATISTICS, LayerStats
from tests.matrix import ROWS, Row

NARROW = (24, 40)  # one block of columns
BLOCKS = (8, 160)  # a whole block of 128 columns and a rest
BLOCK = 128

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
pruning_rows = pytest.mark.parametrize("row", [r for r in ROWS if r.prunes], ids=lambda row: row.id)
# Methods whose scores can be set one by one through a weight.
separable_rows = pytest.mark.parametrize(
    "row", [r for r in ROWS if r.prunes and r.by_score], ids=lambda row: row.id
)
level_rows = pytest.mark.parametrize(
    "row", [r for r in ROWS if not r.prunes], ids=lambda row: row.id
)
scale_free_rows = pytest.mark.parametrize(
    "row", [r for r in ROWS if r.statistic != "none" and r.stats_scale], ids=lambda row: row.id
)
data_rows = pytest.mark.parametrize(
    "row", [r for r in ROWS if r.statistic != "none"], ids=lambda row: row.id
)
both_shapes = pytest.mark.parametrize("shape", [NARROW, BLOCKS], ids=["narrow", "blocks"])


# --- material ----------------------------------------------------------------------------


def make(row: Row, **changes: Any) -> Method:
    made: Method = registry.find_method(row.name).make({**row.options, **changes})
    return made


def zero_strength(row: Row) -> Method:
    options = {k: v for k, v in row.options.items() if k not in ("pattern", "sparsity")}
    made: Method = registry.find_method(row.name).make({**options, **row.zero})
    return made


def weights(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(width: int, count: int = 400, seed: int = 1) -> Tensor:
    """Correlated input rows, with channels of unequal energy."""
    return _tokens(width, count, seed).clone()


@functools.cache
def _tokens(width: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator) / width**0.5
    scale = torch.logspace(-0.5, 0.5, width)[torch.randperm(width, generator=generator)]
    return torch.randn(count, width, generator=generator) @ mix * scale


def remember(row: Row, x: Tensor) -> LayerStats | None:
    if row.statistic == "none":
        return None
    stats = STATISTICS[row.statistic].empty(x.shape[1])
    stats.update(x)
    if not row.prunes and make(row).uses_heldout:
        stats.heldout = STATISTICS[row.statistic].empty(x.shape[1])
        stats.heldout.update(x)
    return stats


def run(row: Row, weight: Tensor, x: Tensor, dtype: torch.dtype = torch.float32) -> LayerResult:
    return make(row).compress(weight, remember(row, x), dtype)


def state(stats: LayerStats | None) -> dict[str, Any]:
    found = vars(stats) if stats is not None else {}
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in found.items()}


def asked(size: int, sparsity: float) -> int:
    """Floor of the product with the decimal that was typed."""
    return int(Decimal(str(sparsity)) * size)


def blocks_of(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.split(BLOCK, dim=1)


def assert_budget(row: Row, weight: Tensor) -> None:
    gone = weight == 0
    if row.group == "n:m":
        keep, group = row.budget
        counts = gone.reshape(weight.shape[0], -1, group).sum(dim=-1)
        assert (counts == group - keep).all()
    elif row.group == "layer":
        assert int(gone.sum()) == asked(gone.numel(), row.budget)
    elif row.group == "row":
        assert (gone.sum(dim=1) == asked(weight.shape[1], row.budget)).all()
    elif row.group == "block":
        for block in blocks_of(gone):
            assert int(block.sum()) == asked(block.numel(), row.budget)
    elif row.group == "at least":
        assert int(gone.sum()) >= asked(gone.numel(), row.budget) + 1
    else:
        raise AssertionError(row.group)


def assert_sound(row: Row, weight: Tensor, result: LayerResult) -> None:
    assert result.weight.shape == weight.shape
    assert result.weight.dtype == torch.float32
    assert result.weight.isfinite().all()
    if row.prunes:
        assert_budget(row, result.weight)
        assert result.grid is None
    else:
        assert result.grid.holds(result.weight)


# --- form --------------------------------------------------------------------------------


@every_row
@both_shapes
def test_result_is_sound_and_arguments_are_untouched(row: Row, shape: tuple[int, int]) -> None:
    weight, stats = weights(shape), remember(row, tokens(shape[1]))
    weight_before, stats_before = weight.clone(), state(stats)
    result = make(row).compress(weight, stats)
    assert_sound(row, weight, result)
    result.weight.add_(1.0)  # what comes back is the caller's own
    assert torch.equal(weight, weight_before)
    for name, value in state(stats).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, stats_before[name]), name
        else:
            assert value == stats_before[name], name


@every_row
def test_same_arguments_give_the_same_bits(row: Row) -> None:
    weight, x = weights(BLOCKS), tokens(BLOCKS[1])
    state_before = torch.random.get_rng_state()
    first = run(row, weight, x)
    second = run(row, weight, x)
    assert torch.equal(first.weight, second.weight)
    assert first.damp == second.damp
    assert torch.equal(torch.random.get_rng_state(), state_before)


@every_row
def test_memory_layout_does_not_matter(row: Row) -> None:
    weight, x = weights(NARROW), tokens(NARROW[1])
    expected = run(row, weight, x).weight
    turned = weight.t().contiguous().t()
    inside = torch.zeros(NARROW[0], 2 * NARROW[1])
    inside[:, ::2] = weight
    strided = inside[:, ::2]
    for view in (turned, strided):
        assert not view.is_contiguous()
        before = view.clone()
        assert torch.equal(run(row, view, x).weight, expected)
        assert torch.equal(view, before)


@every_row
def test_gradients_are_not_recorded_in_the_result(row: Row) -> None:
    with torch.no_grad():
        result = run(row, weights(NARROW).requires_grad_(True), tokens(NARROW[1]))
    assert not result.weight.requires_grad


# --- strength ----------------------------------------------------------------------------


@every_row
def test_zero_strength_says_so(row: Row) -> None:
    assert zero_strength(row).does_nothing
    assert not make(row).does_nothing


@pytest.mark.parametrize(
    "row",
    # The threshold rule removes one weight even then; the engine leaves such a layer alone.
    [r for r in ROWS if r.prunes and not r.options.get("compat")],
    ids=lambda row: row.id,
)
def test_zero_strength_is_the_identity(row: Row) -> None:
    weight, x = weights(BLOCKS), tokens(BLOCKS[1])
    result = zero_strength(row).compress(weight, remember(row, x))
    assert torch.equal(result.weight, weight)


@pruning_rows
def test_budget_is_exact_when_scores_tie(row: Row) -> None:
    # Inputs without correlation and of equal energy: nothing breaks a tie.
    x = torch.eye(BLOCKS[1])
    for levels in (1, 2, 3):
        generator = torch.Generator().manual_seed(levels)
        weight = torch.randint(1, levels + 1, BLOCKS, generator=generator).float()
        weight *= torch.randint(0, 2, BLOCKS, generator=generator) * 2 - 1
        assert_budget(row, run(row, weight, x).weight)


@pruning_rows
def test_weights_that_stay_keep_their_value_where_claimed(row: Row) -> None:
    weight, x = weights(BLOCKS), tokens(BLOCKS[1])
    result = run(row, weight, x).weight
    kept = result != 0
    assert torch.equal(result[kept], weight[kept]) == row.keeps_values


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_more_sparsity_always_removes_more(method: str) -> None:
    row = next(r for r in ROWS if r.name == method)
    weight, x = weights(NARROW), tokens(NARROW[1])
    counts = [
        int((make(row, sparsity=s).compress(weight, remember(row, x)).weight == 0).sum())
        for s in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    ]
    assert counts == sorted(counts)
    assert len(set(counts)) == len(counts)


# --- symmetries --------------------------------------------------------------------------


@every_row
def test_claims_of_the_row_are_those_of_the_class(row: Row) -> None:
    method = make(row)
    assert method.statistic == row.statistic
    assert method.permutation_safe == row.permutation_safe
    assert method.kind == ("pruning" if row.prunes else "quantization")
    assert registry.find_method(row.name).paper.startswith("https://")
    assert method.revision


@pytest.mark.parametrize("row", [r for r in ROWS if r.permutation_safe], ids=lambda row: row.id)
def test_permuting_output_rows_permutes_the_result(row: Row) -> None:
    weight, x = weights(NARROW), tokens(NARROW[1])
    order = torch.randperm(NARROW[0], generator=torch.Generator().manual_seed(3))
    expected = run(row, weight, x).weight[order]
    torch.testing.assert_close(run(row, weight[order], x).weight, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", [r for r in ROWS if r.permutation_safe], ids=lambda row: row.id)
def test_rows_do_not_see_each_other_where_claimed(row: Row) -> None:
    weight, x = weights(NARROW), tokens(NARROW[1])
    whole = run(row, weight, x).weight
    for i in (0, 11, NARROW[0] - 1):
        alone = run(row, weight[i : i + 1], x).weight
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-5)


@scale_free_rows
def test_scale_of_the_inputs_does_not_matter(row: Row) -> None:
    weight, x = weights(BLOCKS), tokens(BLOCKS[1])
    expected = run(row, weight, x).weight
    # A power of two scales every intermediate result exactly.
    for power in (-18, 1, 12):
        assert torch.equal(run(row, weight, x * 2.0**power).weight, expected)


@pytest.mark.parametrize("row", [r for r in ROWS if r.weight_scale], ids=lambda row: row.id)
def test_scale_of_the_weights_passes_through(row: Row) -> None:
    weight, x = weights(BLOCKS), tokens(BLOCKS[1])
    expected = run(row, weight, x).weight
    for power in (-12, 5):
        scaled = run(row, weight * 2.0**power, x).weight
        assert torch.equal(scaled, expected * 2.0**power)


@pruning_rows
def test_sign_of_the_weights_passes_through(row: Row) -> None:
    weight, x = weights(BLOCKS), tokens(BLOCKS[1])
    assert torch.equal(run(row, -weight, x).weight, -run(row, weight, x).weight)


@scale_free_rows
def test_repeating_the_data_changes_nothing(row: Row) -> None:
    weight, x = weights(NARROW), tokens(NARROW[1])
    # 4 copies: the statistic is 4 times as large, up to the order of summation.
    once, often = run(row, weight, x).weight, run(row, weight, x.repeat(4, 1)).weight
    torch.testing.assert_close(often, once, rtol=1e-3, atol=1e-3)


# --- dtypes ------------------------------------------------------------------------------


def separated(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, inputs without correlation and scores that differ by 1 % at least."""
    generator = torch.Generator().manual_seed(5)
    size = NARROW[0] * NARROW[1]
    scores = 1.01 ** torch.randperm(size, generator=generator).reshape(NARROW).double() / 64
    signs = torch.randint(0, 2, NARROW, generator=generator) * 2 - 1
    norms = torch.logspace(-0.5, 0.5, NARROW[1], dtype=torch.float64)
    divisor = torch.ones_like(norms)
    if row.statistic == "moments":
        divisor = norms
    elif row.statistic == "gram":
        damp = make(row).options()["damp"]
        divisor = (norms.square() + damp * norms.square().mean()).sqrt()
    return (scores * signs / divisor).float(), torch.diag(norms).float(), scores


def expected_mask(row: Row, scores: Tensor) -> Tensor:
    """Sort the scores of each comparison group; the first ones go."""
    kind = row.group
    if kind == "n:m":
        keep, group = row.budget
        flat, count = scores.reshape(-1, group), group - keep
    elif kind == "row":
        flat, count = scores, asked(scores.shape[1], row.budget)
    else:
        flat = scores.reshape(1, -1)
        count = asked(scores.numel(), row.budget) + (kind == "at least")
    mask = torch.ones_like(flat, dtype=torch.bool)
    for line, keep_line in zip(flat, mask, strict=True):
        for index in sorted(range(len(line)), key=lambda i: float(line[i]))[:count]:
            keep_line[index] = False
    return mask.reshape(scores.shape)


@separable_rows
def test_sixteen_bit_weights_give_the_mask_of_float32(row: Row) -> None:
    weight, x, scores = separated(row)
    expected = expected_mask(row, scores)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        result = run(row, weight.to(dtype).float(), x, dtype).weight
        assert torch.equal(result != 0, expected)
        assert torch.equal(result.to(dtype) != 0, expected)  # the cast makes and loses no zero


@level_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_levels_survive_storage_in_the_dtype_of_the_model(row: Row, dtype: torch.dtype) -> None:
    weight, x = weights(NARROW).to(dtype).float() * 0.02, tokens(NARROW[1])
    result = run(row, weight, x, dtype)
    scale = result.grid.scale
    assert torch.equal(scale.to(dtype).float(), scale)
    assert result.grid.holds(result.weight.to(dtype))


# --- odd layers --------------------------------------------------------------------------


def fitting(row: Row, width: int) -> Row | None:
    """Return the row with options that a layer of this width can have, or None."""
    if row.group == "n:m" and width % row.budget[1]:
        return None
    if "group_size" in row.options and width % abs(row.options["group_size"]):
        changed = {**row.options, "group_size": -1}
        return Row(row.name, changed, row.statistic, row.group, row.budget)
    return row


@every_row
def test_small_layers(row: Row) -> None:
    for shape in ((1, 1), (1, 40), (24, 1), (3, 5), (2, 129)):
        fitted, weight, x = fitting(row, shape[1]), weights(shape), tokens(shape[1])
        if fitted is None:
            with pytest.raises(UserError, match="layer has"):
                make(row).check_layer("layer", shape)
            continue
        make(fitted).check_layer("layer", shape)
        assert_sound(fitted, weight, run(fitted, weight, x))


@every_row
def test_constant_weights(row: Row) -> None:
    x = tokens(BLOCKS[1])
    for value in (1.0, -3.0, 1e-6, 1e4):
        weight = torch.full(BLOCKS, value)
        assert_sound(row, weight, run(row, weight, x))
    assert (run(row, torch.zeros(BLOCKS), x).weight == 0).all()


@every_row
def test_rows_of_zeros_stay_zero(row: Row) -> None:
    weight = weights(NARROW)
    weight[3] = 0.0
    result = run(row, weight, tokens(NARROW[1])).weight
    assert (result[3] == 0).all()
    assert result.isfinite().all()


@every_row
def test_inputs_that_are_never_active(row: Row) -> None:
    weight, x = weights(BLOCKS), tokens(BLOCKS[1])
    dead = torch.zeros(BLOCKS[1], dtype=torch.bool)
    dead[[0, 5, 6, 7, 127, 128, 150, 159]] = True
    x[:, dead] = 0.0
    result = run(row, weight, x)
    assert_sound(row, weight, result)
    # What stands in front of a silent input is irrelevant to all other weights; only in the row
    # sums of `ria` it counts, by definition.
    if row.statistic != "none" and row.prunes and row.name != "ria":
        other = weight.clone()
        other[:, dead] = 100.0
        changed = run(row, other, x).weight
        assert torch.equal(changed[:, ~dead], result.weight[:, ~dead])


@every_row
def test_independent_rows_are_independent(row: Row) -> None:
    if not make(row).rows_independent:
        return
    weight, x = weights(NARROW), tokens(NARROW[1])
    whole = run(row, weight, x).weight
    for part in (slice(0, 1), slice(2, 5)):
        assert torch.equal(run(row, weight[part], x).weight, whole[part])


@data_rows
def test_inputs_that_are_all_silent(row: Row) -> None:
    weight = weights(NARROW)
    result = run(row, weight, torch.zeros(50, NARROW[1]))
    assert_sound(row, weight, result)


@data_rows
def test_without_tokens_the_statistic_is_the_identity(row: Row) -> None:
    weight = weights(NARROW)
    method = make(row)
    nothing = STATISTICS[row.statistic].empty(NARROW[1])
    if not row.prunes and method.uses_heldout:
        nothing.heldout = STATISTICS[row.statistic].empty(NARROW[1])
    # Of equal energy, uncorrelated, and without a mean; four times, whose root is exact.
    both = torch.cat([torch.eye(NARROW[1]), -torch.eye(NARROW[1])]).repeat(2, 1)
    expected = method.compress(weight, remember(row, both))
    result = method.compress(weight, nothing)
    assert torch.equal(result.weight, expected.weight)
    assert nothing.tokens == 0


@data_rows
def test_fewer_tokens_than_inputs(row: Row) -> None:
    weight = weights(BLOCKS)
    for count in (1, 3, 20):
        result = run(row, weight, tokens(BLOCKS[1], count))
        assert_sound(row, weight, result)
        if row.statistic == "gram":
            assert result.damp is not None
            assert result.damp >= make(row).options()["damp"]


@data_rows
def test_one_huge_channel(row: Row) -> None:
    weight, x = weights(BLOCKS), tokens(BLOCKS[1])
    x[:, 2] *= 1e4
    result = run(row, weight, x)
    assert_sound(row, weight, result)
    if row.prunes and row.group != "n:m" and row.budget < 0.9:
        assert (result.weight[:, 2] != 0).all()  # no score comes near these


@data_rows
def test_two_equal_channels(row: Row) -> None:
    weight, x = weights(NARROW), tokens(NARROW[1])
    x[:, 9] = x[:, 8]
    assert_sound(row, weight, run(row, weight, x))


@data_rows
def test_missing_statistics_are_refused(row: Row) -> None:
    with pytest.raises(ValueError):
        make(row).compress(weights(NARROW), None)


# --- options -----------------------------------------------------------------------------


def through_flags(given: Mapping[str, Any], tmp_path: Any) -> Recipe:
    return Recipe.from_model_args({name: str(value) for name, value in given.items()})


def through_metadata(given: Mapping[str, Any], tmp_path: Any) -> Recipe:
    return Recipe(**json.loads(json.dumps(Recipe(**given).to_metadata())))


def through_dumped_yaml(given: Mapping[str, Any], tmp_path: Any) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(Recipe(**given).to_metadata()), encoding="utf-8")
    return Recipe.from_yaml(file)


def through_typed_yaml(given: Mapping[str, Any], tmp_path: Any) -> Recipe:
    file = tmp_path / "recipe.yaml"
    lines = [f"{name}: {value}" for name, value in given.items()]
    file.write_text("\n".join(lines), encoding="utf-8")
    return Recipe.from_yaml(file)


@every_row
@pytest.mark.parametrize(
    "way", [through_flags, through_metadata, through_dumped_yaml, through_typed_yaml]
)
def test_options_survive_every_way_in(row: Row, way: Any, tmp_path: Any) -> None:
    recipe = way({"method": row.name, **row.options}, tmp_path)
    made = recipe.make_method()
    assert made == make(row)
    assert made.options() == make(row).options()


@every_row
def test_options_are_plain_and_complete(row: Row) -> None:
    method = make(row)
    options = method.options()
    names = [f.name for f in fields(method)]  # type: ignore[arg-type]
    # A ridge that no stage uses, and a correction by nothing, are no options.
    assert list(options) == [name for name in names if name in options]
    silent = {"damp", "correction"}
    if not row.prunes:
        silent |= {"scheme", "transform", "observer", "act_bits", "act_dynamic", "kv_bits"}
        silent |= {"act_order", "compat"}
    assert set(names) - set(options) <= silent
    assert json.loads(json.dumps(options)) == options
    assert registry.find_method(row.name).make(options) == method
    assert set(row.options) <= set(options)
