"""Ranges of inputs, against loops over single values in float64."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_calib_plugin.statistics import (
    STATISTICS,
    Gram,
    GramRanges,
    Moments,
    Ranges,
    gram_in,
    ranges_in,
    statistic_of,
)
from lm_calib_plugin.statistics.ranges import BINS, HIGHEST, LOWEST

WIDTH = 5
WIDEST = 1 / 64


def rows(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 3, WIDTH)
    x = torch.randn(count, WIDTH, generator=generator) * scale
    x[torch.rand(x.shape, generator=generator) < 0.1] = 0
    return x


def seen(x: Tensor, **how: Tensor) -> Ranges:
    stats = Ranges(WIDTH)
    stats.update(x, **how)
    return stats


class Naive:
    """The same facts, one value at a time."""

    def __init__(self, x: Tensor, weights: list[float], owners: list[int]) -> None:
        self.total = [0.0] * WIDTH
        self.squares = [0.0] * WIDTH
        self.most = [0.0] * WIDTH
        self.most_later = [0.0] * WIDTH
        self.mass = 0.0
        self.values: list[tuple[float, float, bool]] = []
        met: set[int] = set()
        for row, weight, owner in zip(x.double().tolist(), weights, owners, strict=True):
            first = owner not in met
            met.add(owner)
            self.mass += weight
            for j, value in enumerate(row):
                size = abs(value)
                self.total[j] += weight * size
                self.squares[j] += weight * size * size
                self.values.append((size, weight, first))
                if weight > 0:
                    self.most[j] = max(self.most[j], size)
                    if not first:
                        self.most_later[j] = max(self.most_later[j], size)


def naive_bin(size: float) -> tuple[float, float]:
    """Return the ends of the bin of a value, found by doubling and counting."""
    if size == 0:
        return 0.0, 0.0
    if size < 2.0**LOWEST:
        return 0.0, 2.0**LOWEST
    if size >= 2.0**HIGHEST:
        return 2.0**HIGHEST, float("inf")
    octave = 2.0**LOWEST
    while octave * 2 <= size:
        octave *= 2
    step = octave / 64
    number = 0
    while octave + (number + 1) * step <= size:
        number += 1
    return octave + number * step, octave + (number + 1) * step


@pytest.mark.parametrize("weighted", [False, True])
def test_everything_is_what_a_loop_finds(weighted: bool) -> None:
    x = rows(40)
    x[3, 2], x[11, 1], x[12, 0] = 3e6, 1e-11, -(2.0**LOWEST)
    owners = torch.arange(8).repeat_interleave(5)
    each = torch.tensor([1.0, 2.0, 0.5, 0.0, 1.0, 3.0, 0.25, 2.0])[owners]
    weights = each if weighted else torch.ones(40)
    stats = seen(x, owners=owners, **({"weights": weights} if weighted else {}))
    naive = Naive(x, weights.tolist(), owners.tolist())
    assert stats.tokens == 40
    assert stats.mass == pytest.approx(naive.mass)
    np.testing.assert_allclose(stats.mean_abs(), np.array(naive.total) / naive.mass, rtol=1e-6)
    np.testing.assert_allclose(stats.energy(), naive.squares, rtol=1e-6)
    assert stats.channel_max().tolist() == naive.most
    assert stats.channel_max(first=False).tolist() == naive.most_later
    assert stats.limit == max(naive.most)
    assert stats.limit_without_first == max(naive.most_later)
    for first in (True, False):
        expected: dict[tuple[float, float], float] = defaultdict(float)
        limit = stats.limit if first else stats.limit_without_first
        for size, weight, was_first in naive.values:
            if weight and (first or not was_first):
                low, high = naive_bin(size)
                expected[(min(low, limit), min(high, limit))] += weight
        found = zip(*(part.tolist() for part in stats.bins(first)), strict=True)
        assert {(low, high): count for low, high, count in found} == pytest.approx(expected)


def test_first_rows_do_not_have_to_stand_together() -> None:
    x = torch.tensor([[9.0], [1.0], [8.0], [2.0], [7.0]]).expand(-1, WIDTH).contiguous()
    stats = seen(x, owners=torch.tensor([4, 4, 1, 4, 1]))
    assert stats.limit == 9
    assert stats.limit_without_first == 7
    assert seen(x).limit_without_first == 8  # one sequence


def test_bins_are_narrow_and_cover_everything() -> None:
    x = torch.logspace(-35, 25, 4000, base=2.0, dtype=torch.float64).float()[:, None]
    stats = Ranges(1)
    stats.update(x)
    low, high, counts = stats.bins()
    assert counts.sum() == 4000
    inner = (low >= 2.0**LOWEST) & (high <= 2.0**HIGHEST)
    assert ((high - low)[inner] <= low[inner] * WIDEST).all()
    assert stats.histogram is not None
    assert stats.histogram.shape == (BINS,)


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("first", [True, False])
def test_quantile_is_that_of_the_values_within_a_bin(q: float, first: bool) -> None:
    x = rows(400)
    owners = torch.arange(20).repeat_interleave(20)
    stats = seen(x, owners=owners)
    counted = x if first else x.reshape(20, 20, WIDTH)[:, 1:]
    exact = float(np.quantile(counted.double().abs().numpy(), q, method="inverted_cdf"))
    assert stats.quantile(q, first) == pytest.approx(exact, rel=WIDEST, abs=2.0**LOWEST)
    if q == 1:
        assert stats.quantile(q, first) == exact


def test_weights_count_rows_as_often() -> None:
    x = rows(30)
    times = torch.tensor([1, 2, 3]).repeat(10)
    owners = torch.arange(10).repeat_interleave(3)
    weighted = seen(x, weights=times.float(), owners=owners)
    repeated = seen(x.repeat_interleave(times, 0), owners=torch.arange(30).repeat_interleave(times))
    assert torch.equal(weighted.histogram, repeated.histogram)
    torch.testing.assert_close(weighted.mean_abs(), repeated.mean_abs())
    torch.testing.assert_close(weighted.energy(), repeated.energy())
    assert weighted.quantile(0.7) == pytest.approx(repeated.quantile(0.7))


def test_merging_whole_sequences_is_exact() -> None:
    x, owners = rows(60), torch.arange(12).repeat_interleave(5)
    whole, left, right = seen(x, owners=owners), Ranges(WIDTH), Ranges(WIDTH)
    left.update(x[:25], owners=owners[:25])
    right.update(x[25:], owners=owners[25:])
    left.merge(right)
    for name in ("histogram", "histogram_first", "peak_first", "peak_later"):
        assert torch.equal(getattr(left, name), getattr(whole, name)), name
    assert left.mass == 60
    torch.testing.assert_close(left.sum_absolute, whole.sum_absolute)


@pytest.mark.parametrize("kind", [Ranges, GramRanges])
def test_scaling_changes_counts_but_not_maxima(kind: type[Ranges] | type[GramRanges]) -> None:
    stats = kind(WIDTH)
    stats.update(rows(30))
    whole, half = ranges_in(stats), ranges_in(stats.scaled(0.5))
    assert half.limit == whole.limit
    assert half.limit_without_first == whole.limit_without_first
    assert half.mass == 15
    torch.testing.assert_close(half.mean_abs(), whole.mean_abs())
    assert half.quantile(0.9) == pytest.approx(whole.quantile(0.9))
    empty = kind(WIDTH)
    empty.borrow(stats, 0.5)
    assert ranges_in(empty).limit == whole.limit
    assert ranges_in(stats.scaled(0.0)).channel_max().tolist() == [1] * WIDTH  # as if unseen
    assert whole.mass == 30


def test_unseen_inputs_are_equally_large() -> None:
    stats = Ranges(WIDTH)
    stats.update(rows(0))
    assert (stats.limit, stats.limit_without_first, stats.quantile(0.9)) == (1, 1, 1)
    assert torch.equal(stats.mean_abs(), torch.ones(WIDTH))
    silent = seen(torch.zeros(3, WIDTH))
    assert (silent.limit, silent.quantile(0.5), silent.quantile(1.0)) == (0, 0, 0)


@pytest.mark.parametrize("name", ["moments", "gram", "ranges", "gram+ranges"])
def test_divided_is_the_statistic_of_divided_inputs(name: str) -> None:
    x, factors = rows(50), torch.tensor([0.5, 2.0, 3.0, 1.0, 0.1])
    stats, expected = STATISTICS[name].empty(WIDTH), STATISTICS[name].empty(WIDTH)
    stats.heldout = STATISTICS[name].empty(WIDTH)
    for part, rows_of in ((stats, x), (stats.heldout, x[:9]), (expected, x / factors)):
        part.update(rows_of)
    before = stats.energy()
    divided = stats.divided(factors)
    torch.testing.assert_close(divided.energy(), expected.energy())
    assert divided.tokens == 50
    assert torch.equal(stats.energy(), before)
    assert divided.heldout is not None
    exact = (x[:9] / factors).double().square().sum(0)
    torch.testing.assert_close(divided.heldout.energy().double(), exact, rtol=1e-5, atol=0)
    if isinstance(divided, Gram):
        assert isinstance(expected, Gram)
        torch.testing.assert_close(divided.gram(), expected.gram())
    if "ranges" in name:
        found, wanted = ranges_in(divided), ranges_in(expected)
        torch.testing.assert_close(found.channel_max(), wanted.channel_max())
        torch.testing.assert_close(found.mean_abs(), wanted.mean_abs())
        assert found.limit_without_first == pytest.approx(wanted.limit_without_first)
        with pytest.raises(ValueError, match="histogram of rescaled"):
            found.quantile(0.9)
        with pytest.raises(ValueError, match="not known"):
            found.update(x)
        found.merge(wanted)
        with pytest.raises(ValueError, match="histogram of rescaled"):
            found.bins()
        assert ranges_in(stats).quantile(1.0) == ranges_in(stats).limit


@pytest.mark.parametrize("name", ["spread", "gram+spread"])
def test_spread_can_not_be_divided(name: str) -> None:
    stats = STATISTICS[name].empty(WIDTH)
    stats.update(rows(10))
    with pytest.raises(ValueError, match="Spread of rescaled inputs"):
        stats.divided(torch.ones(WIDTH))


def test_divided_needs_a_factor_of_every_channel() -> None:
    with pytest.raises(ValueError, match=r"expected \[5\]"):
        Moments(WIDTH).divided(torch.ones(WIDTH - 1))


def test_gram_and_ranges_are_found_where_they_are() -> None:
    stats = GramRanges(WIDTH)
    stats.update(rows(20), owners=torch.arange(4).repeat_interleave(5))
    assert gram_in(stats) is stats.gram()
    assert ranges_in(stats) is stats.ranges
    assert ranges_in(stats).histogram_first.sum() == 4 * WIDTH  # type: ignore[union-attr]
    for other in (Gram(WIDTH), Moments(WIDTH), None):
        with pytest.raises(ValueError, match="ranges"):
            ranges_in(other)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["ranges"], "ranges"),
        (["moments", "ranges", "none"], "ranges"),
        (["gram", "ranges"], "gram+ranges"),
        (["gram+ranges", "moments"], "gram+ranges"),
        (["gram", "spread"], "gram+spread"),
        (["moments", "none"], "moments"),
        ([], "none"),
    ],
)
def test_one_statistic_holds_all_that_is_wanted(kinds: list[str], expected: str) -> None:
    assert statistic_of(kinds) == expected


def test_nothing_holds_spread_and_ranges() -> None:
    with pytest.raises(ValueError, match="spread and ranges"):
        statistic_of(["gram+spread", "ranges"])
