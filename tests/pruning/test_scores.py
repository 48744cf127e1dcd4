"""Magnitude and Wanda against the sentence of the paper."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.statistics import Gram, Moments
from tests.methods import method_of


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moments(x: Tensor) -> Moments:
    stats = Moments.empty(x.shape[1])
    stats.update(x)
    return stats


def output_error(x: Tensor, before: Tensor, after: Tensor) -> float:
    return float((x.double() @ (after - before).double().t()).square().sum())


def test_magnitude_removes_the_smallest_of_the_whole_layer() -> None:
    weight = torch.randn(7, 10, generator=generator(0))
    result = method_of("magnitude", sparsity=0.37).compress(weight, None).weight
    order = sorted(itertools.product(range(7), range(10)), key=lambda at: abs(float(weight[at])))
    gone = {(int(i), int(j)) for i, j in (result == 0).nonzero()}
    assert gone == set(order[:25])  # floor(70 * 0.37)


def test_wanda_removes_the_smallest_of_weight_times_input_norm_in_every_row() -> None:
    weight = torch.randn(7, 10, generator=generator(1))
    x = torch.randn(33, 10, generator=generator(2)) * torch.logspace(-1, 1, 10)
    result = method_of("wanda", sparsity=0.37).compress(weight, moments(x)).weight
    for i in range(7):
        scores = [abs(float(weight[i, j])) * float(x[:, j].double().norm()) for j in range(10)]
        expected = set(sorted(range(10), key=lambda j: scores[j])[:3])
        assert {j for j in range(10) if result[i, j] == 0} == expected


def test_ria_removes_the_smallest_relative_importance_of_the_whole_layer() -> None:
    weight = torch.randn(7, 10, generator=generator(1))
    weight[:, 3] = 0  # a column without any share
    x = torch.randn(33, 10, generator=generator(2)) * torch.logspace(-1, 1, 10)
    result = method_of("ria", sparsity=0.5).compress(weight, moments(x)).weight
    w = weight.abs().double()

    def score(at: tuple[int, int]) -> float:
        i, j = at
        if w[i, j] == 0:
            return 0.0
        share = float(w[i, j] / sum(w[k, j] for k in range(7)))
        share += float(w[i, j] / sum(w[i, k] for k in range(10)))
        return share * float(x[:, j].double().norm()) ** 0.5

    order = sorted(itertools.product(range(7), range(10)), key=score)
    assert {(int(i), int(j)) for i, j in (result == 0).nonzero()} == set(order[:35])


@pytest.mark.parametrize("options", [{"sparsity": 0.43}, {"pattern": "2:4"}, {"pattern": "1:4"}])
def test_wanda_with_equal_channel_norms_is_magnitude_in_every_row(options: dict) -> None:
    weight = torch.randn(6, 20, generator=generator(3))
    x = torch.randint(0, 2, (50, 20), generator=generator(4)) * 2.0 - 1.0  # all norms sqrt(50)
    result = method_of("wanda", **options).compress(weight, moments(x)).weight
    for i in range(6):
        row = method_of("magnitude", **options).compress(weight[i : i + 1], None).weight
        assert torch.equal(result[i : i + 1], row)


def test_wanda_with_uncorrelated_inputs_is_the_best_mask_there_is() -> None:
    weight = torch.randn(2, 4, generator=generator(5))
    x = torch.diag(torch.tensor([0.3, 2.0, 1.0, 0.7]))
    result = method_of("wanda", sparsity=0.5).compress(weight, moments(x)).weight
    for i in range(2):
        errors = []
        for gone in itertools.combinations(range(4), 2):
            candidate = weight[i : i + 1].clone()
            candidate[:, list(gone)] = 0
            errors.append(output_error(x, weight[i : i + 1], candidate))
        reached = output_error(x, weight[i : i + 1], result[i : i + 1])
        assert reached == pytest.approx(min(errors), rel=1e-6)


@pytest.mark.parametrize("bits16", [False, True])
def test_reference_magnitude_is_the_threshold_of_the_published_code(bits16: bool) -> None:
    weight = torch.randn(9, 30, generator=generator(6))
    if bits16:
        weight = weight.bfloat16().float()  # many ties
    result = method_of("magnitude", sparsity=0.4, compat="reference").compress(weight, None).weight
    ranked = torch.sort(weight.abs().flatten())[0]
    threshold = ranked[int(weight.numel() * 0.4)]
    expected = weight.clone()
    expected[weight.abs() <= threshold] = 0
    assert torch.equal(result, expected)
    assert int((result == 0).sum()) > int(270 * 0.4)


def test_reference_wanda_is_the_stable_sort_of_the_published_code() -> None:
    weight = torch.randint(-3, 4, (9, 30), generator=generator(7)).float()
    x = torch.randn(40, 30, generator=generator(8))
    score = weight.abs() * moments(x).energy().sqrt()
    indices = torch.sort(score, dim=-1, stable=True)[1][:, : int(30 * 0.4)]
    expected = weight.clone().scatter_(1, indices, 0)
    for compat in (None, "reference"):
        result = method_of("wanda", sparsity=0.4, compat=compat).compress(weight, moments(x)).weight
        assert torch.equal(result, expected)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_reference_n_of_m_is_the_loop_over_groups(method: str) -> None:
    """With uncorrelated inputs of equal energy, all three rank by magnitude."""
    weight = torch.randn(5, 16, generator=generator(9))
    expected = weight.clone()
    for start in range(0, 16, 4):
        part = weight[:, start : start + 4].abs()
        gone = torch.topk(part, 3, dim=1, largest=False)[1]
        expected.scatter_(1, start + gone, 0)
    stats = {"moments": moments(torch.eye(16)), "gram": Gram.empty(16), "none": None}
    made = method_of(method, pattern="1:4", compat="reference")
    result = made.compress(weight, stats[made.statistic])
    assert torch.equal(result.weight, expected)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_width_without_whole_groups_is_refused_by_name(method: str) -> None:
    with pytest.raises(UserError, match="mlp.down_proj has 50 inputs, not divisible by 4"):
        method_of(method, pattern="2:4").check_layer("mlp.down_proj", (8, 50))
    method_of(method, pattern="2:4").check_layer("mlp.down_proj", (50, 8))
    method_of(method, sparsity=0.5).check_layer("mlp.down_proj", (8, 50))


@pytest.mark.parametrize(
    ("pattern", "fraction"), [("2:4", 0.5), ("1:4", 0.75), ("3:4", 0.25), ("4:8", 0.5)]
)
def test_first_number_of_a_pattern_is_what_is_kept(pattern: str, fraction: float) -> None:
    method = method_of("magnitude", pattern=pattern)
    assert method.sparsity == fraction
    result = method.compress(torch.randn(4, 16, generator=generator(10)), None).weight
    assert float((result == 0).float().mean()) == fraction
