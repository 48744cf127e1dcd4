"""The mathematics of structural pruning against float64 and against exhaustive search."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.errors import NumericalError, UserError
from lm_calib_plugin.pruning.structure.angular import Angular
from lm_calib_plugin.pruning.structure.depth_cosine import DepthCosine
from lm_calib_plugin.pruning.structure.depth_l1 import DepthL1
from lm_calib_plugin.pruning.structure.depth_l2 import DepthL2
from lm_calib_plugin.pruning.structure.flap import Flap
from lm_calib_plugin.pruning.structure.recovery import LowRankUpdate, MeanUpdate, Term
from lm_calib_plugin.pruning.structure.shortgpt import ShortGPT
from lm_calib_plugin.statistics.joint import ChannelVariance, JointMoments


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def applied(term: Term, x: Tensor) -> Tensor:
    found = term.shift.expand(x.shape[0], -1)
    if term.down is not None and term.up is not None:
        found = found + x.double() @ term.down.t() @ term.up.t()
    return found


def moments(x: Tensor, y: Tensor, parts: int = 1, weights: Tensor | None = None) -> JointMoments:
    found = JointMoments(x.shape[1], y.shape[1])
    for index in torch.arange(x.shape[0]).tensor_split(parts):
        found.update(x[index], y[index], None if weights is None else weights[index])
    return found


# --- distances ---------------------------------------------------------------------------


def cosine64(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


@pytest.mark.parametrize("step", [1.0, 1e-2, 1e-4])
def test_distances_are_their_definition(step: float) -> None:
    before = rows(50, 24) * torch.logspace(-2, 3, 24)
    after = (before.double() + step * rows(50, 24, 1).double() * before.double().abs()).float()
    cos = cosine64(before, after)
    change = (after.double() - before.double()).abs()
    expected = {
        ShortGPT: 1 - cos,
        DepthCosine: 1 - cos,
        Angular: cos.clamp(-1, 1).arccos() / math.pi,
        DepthL1: change.sum(-1) / before.double().abs().sum(-1),
        DepthL2: change.square().sum(-1).sqrt() / before.double().square().sum(-1).sqrt(),
    }
    for cls, value in expected.items():
        found = cls(blocks=1).distance(before, after)
        assert found.dtype == torch.float32
        # Small angles too, where 1 - cos in float32 would have no digit left.
        torch.testing.assert_close(
            found.double(), value, rtol=1e-2 if step < 1e-3 else 1e-4, atol=0
        )


def test_a_small_turn_keeps_its_digits() -> None:
    before = torch.tensor([[1.0, 0.0]])
    after = torch.tensor([[1.0, 1e-5]])
    expected = 1 - math.cos(math.atan(1e-5))
    assert float(ShortGPT(blocks=1).distance(before, after)) == pytest.approx(5e-11, rel=1e-4)
    assert expected == pytest.approx(5e-11, rel=1e-4)


def test_large_activations_of_16_bits_do_not_overflow() -> None:
    before = torch.full((3, 64), 3e4, dtype=torch.float16)
    after = before.clone()
    after[:, 0] = -3e4
    expected = 1 - cosine64(before, after)
    found = ShortGPT(blocks=1).distance(before, after)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    assert bool(DepthL2(blocks=1).distance(before, after).isfinite().all())


def test_rows_of_zeros() -> None:
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    for cls in (ShortGPT, Angular, DepthL1, DepthL2):
        assert float(cls(blocks=1).distance(zero, zero)) == 0
    assert float(ShortGPT(blocks=1).distance(zero, one)) == pytest.approx(1.0)
    assert float(Angular(blocks=1).distance(one, zero)) == pytest.approx(0.5)
    assert float(Angular(blocks=1).distance(one, -one)) == pytest.approx(1.0)


# --- what goes ---------------------------------------------------------------------------


def test_the_lowest_go_and_earlier_ones_first() -> None:
    values = [0.5, 0.1, 0.3, 0.1, 0.1]
    for count, expected in enumerate([[], [1], [1, 3], [1, 3, 4], [1, 2, 3, 4]]):
        assert ShortGPT(blocks=count).choose(values, count) == expected
    assert Angular(blocks=2).choose([0.3, 0.2, 0.2, 0.4], 2) == [1, 2]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"blocks": 3}, 3), ({"sparsity": 0.29}, 29), ({"sparsity": 0.999}, 99), ({"sparsity": 0}, 0)],
)
def test_counts_are_exact(given: dict[str, float], expected: int) -> None:
    assert ShortGPT(**given).count(100) == expected  # type: ignore[arg-type]


def test_one_block_has_to_stay() -> None:
    with pytest.raises(UserError, match="blocks<=11"):
        ShortGPT(blocks=12).count(12)


def test_zero_strength_says_so() -> None:
    for given in ({"blocks": 0}, {"sparsity": 0.0}):
        assert ShortGPT(**given).does_nothing  # type: ignore[arg-type]
    assert not ShortGPT(blocks=1).does_nothing
    assert Flap(sparsity=0.0).does_nothing


def test_there_is_nothing_to_do_to_one_weight() -> None:
    with pytest.raises(TypeError, match="whole models"):
        ShortGPT(blocks=1).compress(torch.ones(2, 2), None)


# --- recovery ----------------------------------------------------------------------------


def test_moments_are_those_of_all_rows_however_they_are_cut() -> None:
    x = rows(90, 5) * torch.logspace(-1, 2, 5) + 1e3
    y = rows(90, 4, 1) + x[:, :4]
    weights = torch.rand(90, generator=torch.Generator().manual_seed(2))
    for w in (None, weights):
        share = (torch.ones(90) if w is None else w).double()
        share /= share.sum()
        mean_x, mean_y = share @ x.double(), share @ y.double()
        dx, dy = x.double() - mean_x, y.double() - mean_y
        for parts in (1, 7, 90):
            found = moments(x, y, parts, w)
            torch.testing.assert_close(found.mean_input, mean_x, rtol=1e-12, atol=0)
            torch.testing.assert_close(found.mean_output, mean_y, rtol=1e-12, atol=0)
            inner, cross = (dx.t() * share) @ dx, (dy.t() * share) @ dx
            torch.testing.assert_close(found.covariance(), inner, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found.cross_covariance(), cross, rtol=1e-9, atol=1e-9)


def test_the_mean_is_exact_for_a_constant() -> None:
    x, y = rows(40, 6), torch.arange(6.0).expand(40, 6)
    term = MeanUpdate().fit(moments(x, y, 3))
    torch.testing.assert_close(applied(term, x), y.double(), rtol=1e-12, atol=1e-12)


def test_full_rank_without_ridge_is_the_linear_map() -> None:
    x = rows(200, 6) * torch.logspace(-3, 3, 6) + 5
    y = x.double() @ rows(6, 6, 1).double() + rows(1, 6, 2)
    term = LowRankUpdate(rank=6, ridge=0.0).fit(moments(x.double(), y))
    torch.testing.assert_close(applied(term, x), y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_is_the_best_of_its_rank(rank: int) -> None:
    """Against alternating least squares from many starts, in float64."""
    x = (rows(300, 5) @ rows(5, 5, 1)).double()
    y = x @ rows(5, 5, 2).double() + 0.3 * rows(300, 5, 3).double()
    term = LowRankUpdate(rank=rank, ridge=0.0).fit(moments(x, y))
    error = (applied(term, x) - y).square().sum()
    cx, cy = x - x.mean(0), y - y.mean(0)
    best = math.inf
    for seed in range(5):
        up = rows(5, rank, 10 + seed).double()
        for _ in range(300):
            down = torch.linalg.lstsq(cx, cy @ torch.linalg.pinv(up).t()).solution.t()
            up = torch.linalg.lstsq(cx @ down.t(), cy).solution.t()
        best = min(best, float((cx @ down.t() @ up.t() - cy).square().sum()))
    assert float(error) <= best * (1 + 1e-6)


def test_the_scale_of_an_input_does_not_matter() -> None:
    x, y = rows(100, 5), rows(100, 5, 1) + rows(100, 5)
    scale = torch.tensor([1.0, 1e4, 1e-4, 10.0, 1.0])
    plain = applied(LowRankUpdate(rank=2).fit(moments(x, y)), x)
    scaled = applied(LowRankUpdate(rank=2).fit(moments(x * scale, y)), x * scale)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5)


def test_silent_inputs_and_too_few_rows() -> None:
    x, y = rows(3, 6), rows(3, 6, 1)
    x[:, 2] = 0
    assert bool(applied(LowRankUpdate().fit(moments(x, y)), x).isfinite().all())
    with pytest.raises(NumericalError, match="ridge"):
        LowRankUpdate(ridge=0.0).fit(moments(x, y))


# --- heads and neurons -------------------------------------------------------------------


def test_variance_is_that_of_all_rows_however_they_are_cut() -> None:
    x = rows(80, 5) * torch.logspace(-2, 2, 5) + 1e3
    expected = x.double().var(dim=0, correction=0)
    for parts in (1, 6, 80):
        seen = ChannelVariance(5)
        for part in x.tensor_split(parts):
            seen.update(part)
        torch.testing.assert_close(seen.variance(), expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(seen.mean, x.double().mean(dim=0), rtol=1e-12, atol=0)


def naive_scores(weight: Tensor, x: Tensor, width: int, attention: bool) -> list[float]:
    """FLAP's scores, channel by channel in plain Python."""
    scores = []
    for j in range(weight.shape[1]):
        column = [float(v) for v in x[:, j].double()]
        mean = sum(column) / len(column)
        variance = sum((v - mean) ** 2 for v in column) / len(column)
        score = variance * sum(float(w) ** 2 for w in weight[:, j].double())
        scores.append(score**2 if attention else score)
    mean = sum(scores) / len(scores)
    spread = (sum((s - mean) ** 2 for s in scores) / (len(scores) - 1)) ** 0.5
    scaled = [(s - mean) / spread for s in scores]
    return [sum(scaled[u : u + width]) / width for u in range(0, len(scaled), width)]


@pytest.mark.parametrize(("width", "attention"), [(1, False), (8, True)])
def test_scores_are_the_naive_ones(width: int, attention: bool) -> None:
    weight, x = rows(7, 24), rows(60, 24, 1) * torch.logspace(-1, 1, 24)
    seen = ChannelVariance(24)
    seen.update(x)
    found = Flap(sparsity=0.5).unit_scores(weight, seen.variance(), width, attention)
    expected = torch.tensor(naive_scores(weight, x, width, attention), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.05, 0.29, 0.5, 0.9])
def test_the_budget_counts_parameters(sparsity: float) -> None:
    scores = [rows(1, n, seed=n)[0].double() for n in (4, 30, 4, 30)]
    sizes = [100, 7, 90, 7]
    removed = Flap(sparsity=sparsity).choose(scores, sizes)
    total = sum(p * s.numel() for p, s in zip(sizes, scores, strict=True))
    ranked = sorted((float(v), g, i) for g, group in enumerate(scores) for i, v in enumerate(group))
    spent, expected = 0, set()
    for _, g, i in ranked:
        if spent + sizes[g] > sparsity * total:
            break
        spent += sizes[g]
        expected.add((g, i))
    found = {(g, i) for g, mask in enumerate(removed) for i in mask.nonzero().flatten().tolist()}
    assert found == expected
    assert sparsity * total - max(sizes) < spent <= sparsity * total


def test_equal_scores_go_in_order() -> None:
    removed = Flap(sparsity=0.5).choose([torch.zeros(3), torch.zeros(3)], [1, 1])
    assert [m.tolist() for m in removed] == [[True] * 3, [False] * 3]


def test_compensation_keeps_the_mean_output() -> None:
    weight, x = rows(5, 8), rows(50, 8, 1) + 2
    for gone in itertools.islice(itertools.combinations(range(8), 3), 10):
        mask = torch.zeros(8, dtype=torch.bool)
        mask[list(gone)] = True
        shift = Flap().compensation(weight, x.double().mean(0), mask)
        masked = weight.clone()
        masked[:, mask] = 0
        expected = (x.double() @ weight.double().t()).mean(0)
        found = (x.double() @ masked.double().t()).mean(0) + shift
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
