"""The Gram matrix is summed in tiles above its diagonal and mirrored when it is asked for."""

from __future__ import annotations

import pytest
import torch

from lm_calib_plugin.engine.watched import copied
from lm_calib_plugin.statistics import Gram, gram

WIDTHS = [1, 7, 8, 9, 23, 24]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "TILE", 8)


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def exact(*parts: torch.Tensor) -> torch.Tensor:
    x = torch.cat(parts).double()
    return x.t() @ x


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_between_updates(width: int, dtype: torch.dtype) -> None:
    one, two = rows(20, width).to(dtype), rows(3, width, 1).to(dtype)
    stats = Gram(width)
    stats.update(one)
    near(stats.gram(), exact(one))
    stats.update(two)
    near(stats.gram(), exact(one, two))
    assert torch.equal(stats.matrix.triu(8), stats.matrix.tril(-8).t())


def test_merging_scaling_and_copies_do_not_need_it_whole() -> None:
    one, two = rows(20, 23), rows(9, 23, 1)
    left, right = Gram(23), Gram(23)
    left.update(one)
    right.update(two)
    doubled, twin = left.scaled(2.0), copied(left, torch.device("cpu"))
    left.merge(right)
    near(left.gram(), exact(one, two))
    near(doubled.gram(), 2 * exact(one))
    near(twin.gram(), exact(one))
    factors = torch.linspace(1, 2, 23)
    near(twin.divided(factors).gram(), exact(one / factors))
    near(twin.gram(), exact(one))
    assert twin.energy().tolist() == twin.matrix.diagonal().tolist()


@pytest.mark.parametrize("place", [0, 22])
def test_no_number_is_noticed_in_every_tile(place: int) -> None:
    x = rows(5, 23)
    x[2, place] = float("nan")
    stats = Gram(23)
    stats.update(x)
    assert not stats.is_finite()
