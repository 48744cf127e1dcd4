"""Which input rows are kept to measure errors on, and what the error is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm_calib_plugin.statistics import TokenSample
from lm_calib_plugin.statistics.sample import relative_error


def numbered(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)[:, None].repeat(1, 2)


@given(st.integers(1, 200), st.integers(1, 40), st.lists(st.integers(0, 200), max_size=8))
def test_chunking_never_changes_which_rows_are_kept(
    count: int, limit: int, cuts: list[int]
) -> None:
    x = numbered(count)
    whole = TokenSample(count, limit)
    whole.update(x)
    parts = TokenSample(count, limit)
    edges = [0, *sorted(min(c, count) for c in cuts), count]
    for a, b in itertools.pairwise(edges):
        parts.update(x[a:b])
    kept = whole.rows()
    assert kept is not None
    assert torch.equal(parts.rows(), kept)
    assert parts.seen == whole.seen == count
    numbers = kept[:, 0].tolist()
    assert 1 <= len(numbers) <= limit
    assert numbers[0] == 0
    assert len({b - a for a, b in itertools.pairwise(numbers)}) <= 1  # evenly spread
    if count <= limit:
        assert len(numbers) == count
    else:
        assert len(numbers) > limit / 2 - 1


def test_nothing_seen_is_none() -> None:
    sample = TokenSample(10)
    assert sample.rows() is None
    sample.update(numbered(0))
    assert sample.rows() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_copies_in_float32(dtype: torch.dtype) -> None:
    x = numbered(4).to(dtype)
    sample = TokenSample(4)
    sample.update(x)
    x.zero_()
    kept = sample.rows()
    assert kept is not None
    assert kept.dtype == torch.float32
    assert torch.equal(kept, numbered(4))


def test_nothing_expected_still_takes_what_comes() -> None:
    sample = TokenSample(0)
    sample.update(numbered(3))
    assert len(sample.rows()) == 3  # type: ignore[arg-type]


def test_relative_error_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 5, 8, generator=generator)
    rows = torch.randn(30, 8, generator=generator)
    wanted = rows.double() @ before.double().t()
    got = rows.double() @ after.double().t()
    expected = float(((got - wanted) ** 2).sum() / (wanted**2).sum())
    assert relative_error(before, after, rows) == pytest.approx(expected, rel=1e-5)


def test_relative_error_of_nothing_changed_and_of_everything_removed() -> None:
    weight, rows = torch.randn(5, 8), torch.randn(30, 8)
    assert relative_error(weight, weight, rows) == 0.0
    assert relative_error(weight, torch.zeros(5, 8), rows) == pytest.approx(1.0, rel=1e-6)
    assert relative_error(weight, 2 * weight, rows) == pytest.approx(1.0, rel=1e-6)
    assert relative_error(weight, -weight, rows) == pytest.approx(4.0, rel=1e-6)


def test_relative_error_without_rows_or_without_output_is_none() -> None:
    weight = torch.randn(5, 8)
    assert relative_error(weight, weight, None) is None
    assert relative_error(torch.zeros(5, 8), weight, torch.randn(3, 8)) is None
    assert relative_error(weight, weight * 2, torch.zeros(3, 8)) is None


def test_small_relative_errors_are_not_lost_to_cancellation() -> None:
    generator = torch.Generator().manual_seed(3)
    before, rows = torch.randn(5, 8, generator=generator), torch.randn(30, 8, generator=generator)
    after = before.clone()
    after[0, 0] += 1e-4
    expected = float(((after - before).double() @ rows.double().t()).square().sum())
    expected /= float((before.double() @ rows.double().t()).square().sum())
    assert relative_error(before, after, rows) == pytest.approx(expected, rel=1e-3)
