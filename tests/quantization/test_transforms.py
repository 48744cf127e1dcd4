"""Scaling of input channels: factors as in the papers, searches against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.grids import GridSpec
from lm_calib_plugin.quantization.transforms.awq import AWQ
from lm_calib_plugin.quantization.transforms.errors import weight_error
from lm_calib_plugin.quantization.transforms.smoothquant import SmoothQuant, smoothing
from lm_calib_plugin.statistics import GramRanges, Ranges

SPEC = GridSpec(bits=3, group_size=8)


def problem(seed: int = 0, width: int = 16) -> tuple[list[Tensor], Tensor]:
    """Two weights and inputs with a few large channels, away from zero mean."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, width, generator=g) + 0.5
    x[:, 3] *= 30
    x[:, 11] *= 8
    weights = [torch.randn(n, width, generator=g) for n in (12, 5)]
    return weights, x


def stats_of(x: Tensor, kind: type = GramRanges):
    stats = kind(x.shape[1])
    stats.update(x)
    return stats


def nearest(weights: list[Tensor]):
    return lambda _i, w: SPEC.fit(w).round(w)


def same(s: Tensor) -> Tensor:
    return s


def output_error(weights: list[Tensor], x: Tensor, s: Tensor) -> float:
    total = 0.0
    for w in weights:
        scaled = w * s
        total += float(((x / s) @ SPEC.fit(scaled).round(scaled).t() - x @ w.t()).square().sum())
    return total


@pytest.mark.parametrize("duo", [False, True])
def test_awq_keeps_the_best_of_all_exponents(duo: bool) -> None:
    for seed in range(4):
        weights, x = problem(seed)
        found = AWQ(duo=duo).scales(weights, stats_of(x), nearest(weights), None, same)
        w = torch.cat([w.abs() / w.abs().amax(1, keepdim=True) for w in weights]).mean(0)
        errors = {None: output_error(weights, x, torch.ones(16))}
        for step in range(20):
            r = step / 20
            s = x.abs().mean(0) ** r / (w ** (1 - r) if duo else 1)
            errors[r] = output_error(weights, x, s / (s.max() * s.min()) ** 0.5)
        # A largest weight lies half a step beyond the outermost level, so that the last bit of a
        # factor can decide to which side it is rounded.
        lowest = min(errors.values())
        assert errors[found.chosen.get("r")] <= 1.01 * lowest
        assert found.after == pytest.approx(lowest, rel=0.01)
        assert found.before == pytest.approx(errors[None], rel=1e-3)
        assert output_error(weights, x, found.factors) == pytest.approx(found.after, rel=1e-3)
        assert found.after <= found.before


def test_awq_is_never_worse_than_rounding_even_where_nothing_helps() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(100, 16, generator=g), torch.randn(6, 16, generator=g)
    stats = stats_of(x)
    found = AWQ(steps=3).scales([w], stats, nearest([w]), None, same)
    assert found.after <= found.before
    # Where any factors cost much, there are none.
    found = AWQ().scales([w], stats, lambda _i, m: w if torch.equal(m, w) else m * 9, None, same)
    assert torch.equal(found.factors, torch.ones(16))
    assert found.chosen == {}


def test_awq_looks_at_tied_factors() -> None:
    weights, x = problem(2)

    def tie(s: Tensor) -> Tensor:
        return s.reshape(2, 8).mean(0).repeat(2)

    found = AWQ().scales(weights, stats_of(x), nearest(weights), None, tie)
    assert torch.equal(found.factors, tie(found.factors))
    assert found.after == pytest.approx(output_error(weights, x, found.factors), rel=1e-3)
    assert found.after <= found.before


def test_dead_channels_and_no_tokens_give_finite_factors() -> None:
    weights, x = problem()
    x[:, 5] = 0
    weights[0][:, 6] = 0
    weights[1][:, 6] = 0
    for part in (AWQ(), AWQ(duo=False), SmoothQuant(), SmoothQuant(alpha="auto")):
        for stats in (stats_of(x), GramRanges(16)):
            s = part.scales(weights, stats, nearest(weights), None, same).factors
            assert bool((s.isfinite() & (s > 0)).all())


def test_smoothquant_is_the_formula() -> None:
    weights, x = problem()
    for alpha in (0.0, 0.5, 0.8, 1.0):
        found = SmoothQuant(alpha=alpha).scales(
            weights, stats_of(x, Ranges), nearest(weights), None, same
        )
        for j in range(16):
            top = max(float(w[:, j].abs().max()) for w in weights)
            expected = float(x[:, j].abs().max()) ** alpha / top ** (1 - alpha)
            assert float(found.factors[j]) == pytest.approx(expected, rel=1e-5)
    # With 1/2, inputs and weights have equal ranges afterwards.
    s = SmoothQuant().scales(weights, stats_of(x, Ranges), nearest(weights), None, same).factors
    inner = torch.cat(weights).abs().amax(0) * s
    torch.testing.assert_close((x / s).abs().amax(0), inner, rtol=1e-4, atol=0)


def per_token(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round() * scale


def w8(_i: int, w: Tensor) -> Tensor:
    return GridSpec(bits=8, group_size=-1).fit(w).round(w)


def test_searched_alpha_is_the_best_for_weights_alone() -> None:
    weights, x = problem(1)
    found = SmoothQuant(alpha="auto").scales(weights, stats_of(x), nearest(weights), None, same)
    peak, inner = x.abs().amax(0), torch.cat(weights).abs().amax(0)
    errors = {None: output_error(weights, x, torch.ones(16))}
    for step in range(13):
        alpha = round(0.3 + 0.05 * step, 2)
        errors[alpha] = output_error(weights, x, smoothing(peak, inner, alpha))
    assert errors[found.chosen.get("alpha")] <= 1.01 * min(errors.values())


def test_searched_alpha_sees_the_error_of_activations() -> None:
    weights, x = problem(1, 16)
    x[:, 3] *= 10

    def true_error(s: Tensor) -> float:
        return sum(
            float((per_token(x / s) @ w8(i, w * s).t() - x @ w.t()).square().sum())
            for i, w in enumerate(weights)
        )

    found = SmoothQuant(alpha="auto").scales(weights, stats_of(x), w8, per_token, same)
    assert found.chosen
    plain = true_error(torch.ones(16))
    peak, inner = x.abs().amax(0), torch.cat(weights).abs().amax(0)
    best = min(true_error(smoothing(peak, inner, 0.3 + 0.05 * k)) for k in range(13))
    assert true_error(found.factors) < 0.2 * plain
    assert true_error(found.factors) < 2 * best
    # Without rounded inputs there is nothing to smooth them for.
    alone = SmoothQuant(alpha="auto").scales(weights, stats_of(x), w8, None, same)
    assert alone.after < found.after


def test_expected_error_of_noise_is_the_mean_over_draws() -> None:
    weights, x = problem(3)
    s = smoothing(x.abs().amax(0), torch.cat(weights).abs().amax(0), 0.5)
    g = torch.Generator().manual_seed(1)
    size = torch.rand(16, generator=g) * 0.3
    draws = []
    for _ in range(300):
        e = torch.randn(x.shape, generator=g) * size
        draws.append(
            sum(
                float((((x / s) + e) @ w8(0, w * s).t() - x @ w.t()).square().sum())
                for w in weights
            )
        )
    expected = weight_error(weights, s, x.t() @ x, w8, size.square() * len(x))
    assert expected == pytest.approx(sum(draws) / len(draws), rel=0.02)


def test_statistics_asked_for_and_options() -> None:
    assert SmoothQuant().statistic == "ranges"
    assert SmoothQuant(alpha="auto").statistic == "gram+ranges"
    assert SmoothQuant.from_texts({"alpha": "0.75"}).alpha == 0.75
    assert SmoothQuant.from_texts({"alpha": "auto"}).options() == {"alpha": "auto"}
    assert (AWQ().feeds, SmoothQuant().feeds) == ("all", "norm")
    for bad in ("half", "1.5", "-0.1", "nan"):
        with pytest.raises(UserError, match="transform.*a number from 0 to 1, or auto"):
            SmoothQuant.from_texts({"alpha": bad})
    with pytest.raises(UserError, match="steps"):
        AWQ(steps=0)
