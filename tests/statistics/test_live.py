"""Merging elsewhere: tensors and numbers that add up are all that a statistic is made of."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm_calib_plugin.statistics import STATISTICS, LayerStats, TokenSample
from lm_calib_plugin.statistics.gram import TILE


def made(kind: str, seed: int, width: int, count: int) -> LayerStats:
    generator = torch.Generator().manual_seed(seed)
    stats = STATISTICS[kind].empty(width)
    stats.heldout = STATISTICS[kind].empty(width)
    for one, rows in ((stats, count), (stats.heldout, count // 2)):
        x = torch.randn(rows, width, generator=generator)
        one.update(x, torch.rand(rows, generator=generator) + 0.5, torch.arange(rows) // 3)
    return stats


def content(stats: LayerStats) -> dict[str, object]:
    """Everything there is to know, Gram matrices whole."""
    found = {}
    for number, leaf in enumerate(stats.leaves()):
        if hasattr(leaf, "matrix"):
            found[f"{number}.matrix"] = leaf.matrix.clone()
        for name, value in vars(leaf).items():
            if name not in ("_sums", "_whole", "device") and not isinstance(value, LayerStats):
                found[f"{number}.{name}"] = value
    return found


@pytest.mark.parametrize("width", [5, TILE + 7])
@pytest.mark.parametrize("counts", [(9, 4), (0, 6), (7, 0)])
@pytest.mark.parametrize("kind", list(STATISTICS))
def test_sums_of_live_tensors_are_a_merge(kind: str, counts: tuple[int, int], width: int) -> None:
    first, second = (made(kind, seed, width, count) for seed, count in enumerate(counts))
    expected = copy.deepcopy(first)
    expected.merge(second)
    expected.heldout.merge(second.heldout)
    for own, other in zip(first.leaves(), second.leaves(), strict=True):
        for (tensor, largest), (more, _) in zip(own.live(), other.live(), strict=True):
            tensor.copy_(torch.maximum(tensor, more) if largest else tensor + more)
        for name in own.numbers:
            setattr(own, name, getattr(own, name) + getattr(other, name))
    found, wanted = content(first), content(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        else:
            assert found[name] == value, name


@given(st.integers(0, 200), st.integers(1, 40), st.lists(st.integers(0, 200), max_size=4))
def test_samples_that_know_where_they_start_are_one(
    count: int, limit: int, cuts: list[int]
) -> None:
    x = torch.arange(count, dtype=torch.float32)[:, None]
    whole = TokenSample(count, limit)
    whole.update(x)
    edges = [0, *sorted(min(c, count) for c in cuts), count]
    parts = [TokenSample(count, limit, start) for start in edges[:-1]]
    for part, (a, b) in zip(parts, itertools.pairwise(edges), strict=True):
        part.update(x[a:b])
        assert part.arrived == b - a
    rows = [part.rows() for part in parts if part.rows() is not None]
    kept = torch.cat(rows) if rows else torch.zeros(0, 1)
    assert sum(part.kept for part in parts) == len(kept)
    joined = parts[0]
    joined.replace(kept, sum(part.arrived for part in parts))
    assert joined.seen == joined.arrived == count
    if whole.rows() is None:
        assert joined.rows() is None
    else:
        assert torch.equal(joined.rows(), whole.rows())
