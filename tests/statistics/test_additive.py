"""Statistics of a union are the merge of the parts, however the tokens are cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lm_calib_plugin.statistics import STATISTICS, Gram, LayerStats, Moments

WIDTH = 6
every_kind = pytest.mark.parametrize("kind", list(STATISTICS.values()), ids=list(STATISTICS))


def rows(count: int, seed: int = 0) -> Tensor:
    scale = torch.logspace(-2, 2, WIDTH)
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * scale


def content(stats: LayerStats) -> Tensor:
    return stats.gram() if isinstance(stats, Gram) else stats.energy()


def direct(kind: type[LayerStats], x: Tensor) -> Tensor:
    exact = x.double()
    gram = exact.t() @ exact
    return gram if issubclass(kind, Gram) else gram.diagonal()


def assert_near(found: Tensor, expected: Tensor) -> None:
    # Relative to the product of the norms: the rounding error of any order of summation.
    norms = expected.diagonal().sqrt() if expected.dim() == 2 else None
    bound = norms[:, None] * norms[None, :] if norms is not None else expected
    assert ((found.double() - expected).abs() <= 1e-5 * bound + 1e-30).all()


def seen(kind: type[LayerStats], *parts: Tensor) -> LayerStats:
    stats = kind.empty(WIDTH)
    for part in parts:
        stats.update(part)
    return stats


@every_kind
def test_statistic_is_its_definition(kind: type[LayerStats]) -> None:
    x = rows(200)
    stats = seen(kind, x)
    assert stats.tokens == 200
    assert_near(content(stats), direct(kind, x))
    assert_near(stats.energy(), direct(Moments, x))
    assert stats.energy().dtype == torch.float32


@every_kind
@given(cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.integers(0, 5))
def test_chunking_is_irrelevant(kind: type[LayerStats], cuts: list[int], seed: int) -> None:
    x = rows(60, seed)
    edges = [0, *sorted(cuts), 60]
    stats = seen(kind, *(x[a:b] for a, b in itertools.pairwise(edges)))
    assert stats.tokens == 60
    assert_near(content(stats), direct(kind, x))


@every_kind
@given(cut=st.integers(0, 60), seed=st.integers(0, 5))
def test_merge_is_the_statistic_of_the_union(kind: type[LayerStats], cut: int, seed: int) -> None:
    x = rows(60, seed)
    left, right = seen(kind, x[:cut]), seen(kind, x[cut:])
    right_before = content(right).clone()
    left.merge(right)
    assert left.tokens == 60
    assert_near(content(left), direct(kind, x))
    assert torch.equal(content(right), right_before)
    assert right.tokens == 60 - cut
    left.update(x[:1])  # what was merged in is not shared
    assert torch.equal(content(right), right_before)


@every_kind
def test_order_of_merging_is_irrelevant(kind: type[LayerStats]) -> None:
    parts = [rows(30, seed) for seed in range(3)]
    forward, backward = kind.empty(WIDTH), kind.empty(WIDTH)
    for part in parts:
        forward.merge(seen(kind, part))
    for part in reversed(parts):
        backward.merge(seen(kind, part))
    assert_near(content(forward), content(backward).double())


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_float_dtype_is_summed_in_float32(kind: type[LayerStats], dtype: torch.dtype) -> None:
    x = rows(300).to(dtype)
    assert_near(content(seen(kind, x)), direct(kind, x.float()))


@every_kind
def test_squares_beyond_half_precision_do_not_overflow(kind: type[LayerStats]) -> None:
    x = torch.full((64, WIDTH), 6e4).half()
    stats = seen(kind, x)
    assert stats.is_finite()
    assert float(stats.energy()[0]) == pytest.approx(64 * 3.6e9, rel=1e-2)


@every_kind
def test_many_small_chunks_lose_nothing(kind: type[LayerStats]) -> None:
    x = torch.ones(1, WIDTH)
    x[0, 0] = 1e-2
    stats = seen(kind, *[x] * 3000)
    assert float(stats.energy()[1]) == pytest.approx(3000, rel=1e-5)
    assert float(stats.energy()[0]) == pytest.approx(0.3, rel=1e-3)


@every_kind
def test_without_tokens_it_is_the_identity(kind: type[LayerStats]) -> None:
    for stats in (kind.empty(WIDTH), seen(kind, rows(0))):
        assert stats.tokens == 0
        assert torch.equal(stats.energy(), torch.ones(WIDTH))
        if isinstance(stats, Gram):
            assert torch.equal(stats.gram(), torch.eye(WIDTH))


@every_kind
def test_merging_nothing_changes_nothing(kind: type[LayerStats]) -> None:
    stats = seen(kind, rows(20))
    before = content(stats).clone()
    stats.merge(kind.empty(WIDTH))
    assert torch.equal(content(stats), before)
    fresh = kind.empty(WIDTH)
    fresh.merge(stats)
    assert torch.equal(content(fresh), before)
    assert fresh.tokens == 20


@every_kind
def test_all_silent_tokens_are_not_the_identity(kind: type[LayerStats]) -> None:
    stats = seen(kind, torch.zeros(5, WIDTH))
    assert stats.tokens == 5
    assert (stats.energy() == 0).all()


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, WIDTH - 1])
def test_a_single_bad_value_is_remembered(kind: type[LayerStats], bad: float, column: int) -> None:
    x = rows(20)
    assert seen(kind, x).is_finite()
    x[7, column] = bad
    assert not seen(kind, x, rows(20)).is_finite()
    merged = seen(kind, rows(20))
    merged.merge(seen(kind, x))
    assert not merged.is_finite()


@every_kind
def test_inputs_are_left_as_they_are(kind: type[LayerStats]) -> None:
    x = rows(20)
    before = x.clone()
    stats = seen(kind, x)
    stats.energy().zero_()
    assert torch.equal(x, before)
    assert (stats.energy() > 0).all()


@every_kind
@pytest.mark.parametrize("shape", [(5, WIDTH + 1), (2, 5, WIDTH), (WIDTH,)])
def test_wrong_shapes_are_refused(kind: type[LayerStats], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tokens, 6"):
        kind.empty(WIDTH).update(torch.zeros(shape))


def test_only_equals_can_be_merged() -> None:
    with pytest.raises(ValueError, match="merged"):
        Gram.empty(WIDTH).merge(Moments.empty(WIDTH))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="merged"):
        Gram.empty(WIDTH).merge(Gram.empty(WIDTH + 1))


def test_energy_of_the_gram_matrix_is_that_of_the_moments() -> None:
    x = rows(100)
    torch.testing.assert_close(seen(Gram, x).energy(), seen(Moments, x).energy())


def test_gram_is_symmetric_and_measures_output_errors() -> None:
    x = rows(50)
    matrix = seen(Gram, x).gram()
    torch.testing.assert_close(matrix, matrix.t())
    change = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    trace = torch.trace(change @ matrix @ change.t())
    assert float(trace) == pytest.approx(float((x @ change.t()).square().sum()), rel=1e-5)
