"""Orthogonal matrices of any size: orthogonal, seeded, Hadamard where one can be built."""

from __future__ import annotations

import pytest
import torch

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.hadamard import Hadamard, hadamard_block
from lm_calib_plugin.quantization.transforms.rotation import Rotation

# Usual widths of models.
WIDE = [576, 768, 896, 1536, 2048, 2560, 3072, 4096, 5120, 14336]


@pytest.mark.parametrize("n", range(1, 201))
def test_orthogonal(n: int) -> None:
    q = Hadamard.random(n, seed=n).dense()
    torch.testing.assert_close(q @ q.t(), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(q.t() @ q, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", WIDE)
def test_wide_ones_keep_all_inner_products(n: int) -> None:
    matrix = Hadamard.random(n, seed=1)
    x = torch.randn(24, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = matrix.apply(x)
    torch.testing.assert_close(y @ y.t(), x @ x.t(), rtol=0, atol=1e-9 * n)
    assert matrix.exact
    one = torch.zeros(3, n, dtype=torch.float64)
    one[torch.arange(3), torch.tensor([0, n // 2, n - 1])] = 1
    size = torch.full((3, n), n**-0.5, dtype=torch.float64)
    torch.testing.assert_close(matrix.apply(one).abs(), size, rtol=1e-9, atol=0)


def test_blocks_are_hadamard_matrices() -> None:
    found = []
    for n in range(1, 401):
        block = hadamard_block(n)
        if block is not None:
            found.append(n)
            assert bool((block.abs() == 1).all())
            assert torch.equal(block @ block.t(), n * torch.eye(n, dtype=torch.float64))
    assert {12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 124, 132, 140, 148} <= set(found)
    # The smallest order that neither construction gives.
    assert 92 not in found


def test_sizes_with_a_hadamard_matrix_get_one() -> None:
    for n in (1, 2, 4, 8, 12, 24, 40, 64, 80, 160, 172 * 2, 576):
        matrix = Hadamard.random(n, 0)
        size = torch.full((n, n), n**-0.5, dtype=torch.float64)
        close = torch.allclose(matrix.dense().abs(), size, rtol=1e-9)
        assert close == matrix.exact
        assert matrix.exact or n == 344
    assert not Hadamard.random(6, 0).exact
    assert not Hadamard.random(7, 0).exact


def test_apply_is_the_product_with_the_dense_matrix() -> None:
    for n in (1, 6, 24, 40):
        signs = Hadamard.random(n, 3)
        x = torch.randn(2, 5, n, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(signs.apply(x), x.double() @ signs.dense())


def test_seeds_choose_the_matrix() -> None:
    for n in (24, 7, 64):
        same = Hadamard.random(n, 5).dense()
        assert torch.equal(same, Hadamard.random(n, 5).dense())
        assert not torch.equal(same, Hadamard.random(n, 6).dense())
    state = torch.random.get_rng_state()
    Hadamard.random(14, 0)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="positive"):
        Hadamard.random(0, 0)


def test_options() -> None:
    part = Rotation.from_texts({"seed": "3", "r2": "false"})
    assert (part.seed, part.r2, part.level) == (3, False, "model")
    with pytest.raises(UserError, match="seed >= 0"):
        Rotation(seed=-1)
