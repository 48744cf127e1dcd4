"""The factor of the inverse, checked by multiplying back in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.statistics import inverse_factor
from lm_calib_plugin.statistics.factor import triangular_inverse


def gram(width: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(count, width, generator=generator) @ mix
    return x.t() @ x


def assert_inverts(upper: Tensor, matrix: Tensor, ridge: float, tolerance: float = 2e-3) -> None:
    damped = matrix.double() + ridge * torch.eye(len(matrix), dtype=torch.float64)
    product = upper.double().t() @ upper.double() @ damped
    eye = torch.eye(len(matrix), dtype=torch.float64)
    torch.testing.assert_close(product, eye, rtol=0, atol=tolerance)


@pytest.mark.parametrize("width", [1, 2, 17, 130])
@pytest.mark.parametrize("damp", [0.0, 0.01, 0.5, 3.0])
def test_factor_times_its_transpose_inverts_the_damped_matrix(width: int, damp: float) -> None:
    matrix = gram(width, 8 * width + 8)
    before = matrix.clone()
    found = inverse_factor(matrix, damp)
    assert torch.equal(matrix, before)
    assert found.damp == damp
    assert not found.dead.any()
    assert torch.equal(found.upper, found.upper.triu())
    assert (found.upper.diagonal() > 0).all()
    assert_inverts(found.upper, matrix, damp * float(matrix.diagonal().mean()))


def test_diagonal_of_the_factor_is_the_cost_of_removing_a_column() -> None:
    """``U_jj^2`` is the first element of the inverse of what remains from column ``j`` on."""
    matrix = gram(12, 60)
    found = inverse_factor(matrix, 0.01)
    damped = matrix.double() + 0.01 * matrix.diagonal().mean().double() * torch.eye(12)
    for j in range(12):
        cost = torch.linalg.inv(damped[j:, j:])[0, 0]
        assert float(found.upper[j, j]) ** 2 == pytest.approx(float(cost), rel=1e-4)


def test_silent_channels_are_marked_and_decoupled() -> None:
    matrix = gram(10, 50)
    silent = [0, 4, 9]
    matrix[silent] = 0.0
    matrix[:, silent] = 0.0
    found = inverse_factor(matrix, 0.01)
    assert found.dead.nonzero().flatten().tolist() == silent
    off = found.upper - torch.diag(found.upper.diagonal())
    assert (off[silent] == 0).all()
    assert (off[:, silent] == 0).all()
    live = [j for j in range(10) if j not in silent]
    ridge = 0.01 * float(matrix.diagonal().mean())  # of the matrix as it was given
    assert_inverts(found.upper[live][:, live], matrix[live][:, live], ridge)


def test_singular_matrix_without_ridge_raises_the_ridge_and_says_so() -> None:
    matrix = torch.full((2, 2), 4.0)  # the second pivot is exactly zero in any precision
    found = inverse_factor(matrix, 0.0)
    assert found.damp == 1e-4
    assert_inverts(found.upper, matrix, found.damp * 4.0)


@pytest.mark.parametrize(("asked", "used"), [(0.05, 0.5), (0.004, 0.4), (0.2, 1.0), (0.4, 0.4)])
def test_ridge_grows_tenfold_up_to_one(asked: float, used: float) -> None:
    matrix = torch.tensor([[1.0, 1.3], [1.3, 1.0]])  # needs a ridge above 0.3
    found = inverse_factor(matrix, asked)
    assert found.damp == pytest.approx(used)
    assert_inverts(found.upper, matrix, used)


def test_asked_ridge_is_kept_when_float64_can_do_it() -> None:
    """In float32, 4 + 4e-9 is 4 and the matrix singular; float64 sees the ridge."""
    matrix = torch.full((2, 2), 4.0)
    found = inverse_factor(matrix, 1e-9)
    assert found.damp == 1e-9
    assert found.upper.dtype == torch.float32
    cost = (4.0 + 4e-9) / ((4.0 + 4e-9) ** 2 - 16.0)  # first element of the inverse
    assert float(found.upper[0, 0]) ** 2 == pytest.approx(cost, rel=1e-5)


@pytest.mark.parametrize("damp", [0.0, 0.001])
def test_few_tokens(damp: float) -> None:
    matrix = gram(40, 3)
    found = inverse_factor(matrix, damp)
    assert found.upper.isfinite().all()
    assert found.damp > 0
    assert found.damp >= damp


def test_scale_of_the_matrix_scales_the_factor() -> None:
    matrix = gram(20, 100)
    small, large = inverse_factor(matrix, 0.01), inverse_factor(matrix * 2.0**30, 0.01)
    assert torch.equal(large.upper, small.upper * 2.0**-15)
    tiny = inverse_factor(matrix * 2.0**-60, 0.01)
    assert torch.equal(tiny.upper, small.upper * 2.0**30)
    assert not tiny.dead.any()


def test_matrix_of_nothing_but_silent_channels_is_the_identity() -> None:
    found = inverse_factor(torch.zeros(5, 5), 0.01)
    assert found.dead.all()
    assert torch.equal(found.upper, torch.eye(5))


@pytest.mark.parametrize(
    "matrix",
    [
        torch.tensor([[1.0, 3.0], [3.0, 1.0]]),
        torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]),
        torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]),
    ],
    ids=["indefinite", "nan", "inf"],
)
def test_what_is_no_gram_matrix_is_an_error_never_an_identity(matrix: Tensor) -> None:
    with pytest.raises(NumericalError, match="Gram matrix, factorization"):
        inverse_factor(matrix, 0.01)


@pytest.mark.parametrize("size", [1, 2, 95, 96, 97, 193, 400])
def test_inverse_by_halves_is_the_inverse(size: int) -> None:
    own = torch.Generator().manual_seed(size)
    upper = torch.randn(size, size, generator=own, dtype=torch.float64).triu(1) / size**0.5
    upper += torch.rand(size, generator=own, dtype=torch.float64).add(0.5).diag()
    found = triangular_inverse(upper)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(found @ upper, eye, rtol=0, atol=1e-10)
    assert (found.tril(-1) == 0).all()
