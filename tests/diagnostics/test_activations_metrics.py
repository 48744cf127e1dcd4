"""Metrics of activations against naive numpy, and what merging may not change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lm_calib_plugin.diagnostics.activations import compared, histogram, rounding
from lm_calib_plugin.diagnostics.activations.features import idle_experts, outlier_features
from lm_calib_plugin.diagnostics.activations.inputs import Input
from lm_calib_plugin.diagnostics.activations.metrics import SIGMAS, measured
from lm_calib_plugin.diagnostics.activations.seen import Seen


def rows(tokens: int = 301, width: int = 40, seed: int = 0, heavy: bool = True) -> torch.Tensor:
    """Rows with channels of many sizes, far values, zeros and a mean that is none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    if heavy:
        x = x * torch.logspace(-2, 1, width) + 0.3
        x[:, 7] *= 100
        x[5, 9], x[17, 11] = 900.0, -700.0
        x[:, 3] = x[21] = 0
        x[:, 4] = 0.7
    return x


def seen_of(x: torch.Tensor, **given: Any) -> Seen:
    seen = Seen(x.shape[1], **given)
    generator = torch.Generator().manual_seed(5)
    ranks = torch.rand(len(x), generator=generator, dtype=torch.float64)
    seen.update(x, torch.arange(len(x)) % 2, ranks)
    return seen


def moments_ratio(values: np.ndarray) -> float | None:
    return None if np.ptp(values) == 0 else float(stats.kurtosis(values, fisher=False))


@pytest.mark.parametrize("heavy", [False, True])
def test_metrics_as_naive(heavy: bool) -> None:
    tensor = rows(heavy=heavy)
    x = tensor.double().numpy()
    found = measured(seen_of(tensor))
    size = np.abs(x)
    assert found["tokens"] == len(x)
    assert found["amax"] == size.max()
    for name, share in (("median", 0.5), ("p99", 0.99), ("p99.9", 0.999)):
        exact = np.sort(size.reshape(-1))[math.ceil(share * size.size) - 1]
        assert found[name] == pytest.approx(exact, rel=histogram.ERROR, abs=1e-12), name
    assert found["max_over_median"] == found["amax"] / found["median"]
    assert found["kurtosis"] == pytest.approx(stats.kurtosis(x.reshape(-1), fisher=False))
    for name, slices in (("kurtosis_tokens", x), ("kurtosis_channels", x.T)):
        known = [k for s in slices if (k := moments_ratio(s)) is not None]
        assert found[name] == pytest.approx(np.mean(known)), name
    middles = np.sort(size, axis=1)[:, (x.shape[1] - 1) // 2]
    ratios = size.max(1)[middles > 0] / middles[middles > 0]
    assert found["token_max_over_median"] == pytest.approx(ratios.mean(), rel=1e-6)
    for k in SIGMAS:
        exact = float((np.abs(x - x.mean()) > k * x.std()).mean())
        error = found["beyond_error"][str(k)]
        assert abs(found["beyond"][str(k)] - exact) <= error + 1e-12, k
        assert error < 0.02
    peaks = size.max(0)
    expected = [int(j) for j in np.argsort(-peaks) if peaks[j] > 20 * np.median(peaks)]
    assert [c["channel"] for c in found["outlier_channels"]] == expected
    assert found["outlier_count"] == len(expected) == (3 if heavy else 0)
    assert found["strict_outliers"] == sum(peaks[j] > 6 for j in expected)
    assert found["dead_channels"] == ([3] if heavy else [])


def test_nothing_seen() -> None:
    assert measured(Seen(4)) == {"tokens": 0}
    zeros = measured(seen_of(torch.zeros(3, 4)))
    assert zeros["amax"] == zeros["median"] == 0
    assert zeros["kurtosis"] is None
    assert zeros["dead_channels"] == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_pieces_in_any_order_are_the_whole(size: int) -> None:
    x = rows()
    whole = seen_of(x, sample=12, gram=True)
    ranks = torch.rand(len(x), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    half = torch.arange(len(x)) % 2
    total = Seen(x.shape[1], sample=12, gram=True)
    for start in reversed(range(0, len(x), size)):
        part, piece = Seen(x.shape[1], sample=12, gram=True), slice(start, start + size)
        part.update(x[piece], half[piece], ranks[piece])
        total.merge(part)
    for name in ("tokens", "peaks", "large", "counts"):
        assert torch.equal(getattr(total, name), getattr(whole, name)), name
    for name in ("powers", "kurtosis", "ratio"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name), rtol=1e-12, atol=0)
    assert total.gram is not None
    assert whole.gram is not None
    torch.testing.assert_close(total.gram.matrix, whole.gram.matrix, rtol=1e-5, atol=1e-2)
    assert torch.equal(total.sample.rows, whole.sample.rows)
    best = ranks.argsort(descending=True)[:12]
    assert torch.equal(whole.sample.rows, x[best])


def test_bins() -> None:
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 2.0**-34, 1.0, -1.0, 3.9e9, 2.0**30, -5e9])
    counts = histogram.counted(values)
    assert counts.sum() == len(values)
    assert counts[0, 0] == 2
    assert counts[:, 1].tolist() == [1, 1]
    assert counts[:, -1].tolist() == [2, 1]
    ends = histogram.edges()
    generator = torch.Generator().manual_seed(0)
    many = torch.exp(20 * torch.randn(5000, generator=generator)).clamp(2.0**-34, 2.0**29)
    naive, _ = np.histogram(many.double().numpy(), ends[1:-1])
    assert np.array_equal(histogram.counted(many)[0, 2:-1].numpy(), naive)
    wide = ends[2:-1] / ends[1:-2]
    assert wide.max() <= 1 + 2 * histogram.ERROR


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.5, 2.0), (-3.0, -0.5), (-9e9, 9e9)])
def test_tails_anywhere(low: float, high: float) -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(3))
    x[:50] = 0
    share, error = histogram.beyond(histogram.counted(x), low, high, float(x.abs().max()))
    exact = float(((x < low) | (x > high)).double().mean())
    assert abs(share - exact) <= error
    assert abs(share - exact) < 2e-3


def naive_int(x: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    return np.clip(np.rint(x / scale), -half, half - 1) * scale


def decibels(x: np.ndarray, rounded: np.ndarray) -> float:
    return float(10 * np.log10((x**2).sum() / ((x - rounded) ** 2).sum()))


def test_rounding_as_naive() -> None:
    tensor = rows(200, 32, heavy=False) * torch.logspace(-1, 1, 32)
    seen = seen_of(tensor, sample=200)
    x = tensor.double().numpy()
    inner = torch.linspace(0.1, 2, 32)
    found = rounding.ratios([seen], inner)
    plain, smoothed = found[rounding.PLAIN], found[rounding.SMOOTHED]
    amax, each = np.abs(x).max(), np.abs(x).max(1, keepdims=True)
    expected = {
        "int8 per tensor": decibels(x, naive_int(x, amax / 127.5, 8)),
        "int8 per token": decibels(x, naive_int(x, each / 127.5, 8)),
        "int4 per token": decibels(x, naive_int(x, each / 7.5, 4)),
    }
    scale = amax / 448
    fp8 = (tensor / float(scale)).to(torch.float8_e4m3fn).double().numpy() * scale
    expected["fp8 per tensor"] = decibels(x, fp8)
    for name, value in expected.items():
        assert plain[name] == pytest.approx(value, abs=0.02), name
    s = np.sqrt(np.abs(x).max(0) / inner.double().numpy())
    y = x / s
    assert smoothed["int8 per tensor"] == pytest.approx(
        decibels(y, naive_int(y, np.abs(y).max() / 127.5, 8)), abs=0.02
    )
    # Spreading channels of very different sizes is what a rotation is for.
    assert found[rounding.ROTATED]["int8 per tensor"] > plain["int8 per tensor"] + 3


def test_first_tokens_weigh_as_many_as_they_are() -> None:
    big, small = 100 * rows(4, 16, 1, heavy=False), rows(400, 16, 2, heavy=False)
    first, rest = seen_of(big, sample=4), seen_of(small, sample=400)
    both = rounding.ratios([first, rest], transforms=False)[rounding.PLAIN]["int8 per tensor"]
    x = torch.cat([big, small]).double().numpy()
    assert both == pytest.approx(decibels(x, naive_int(x, np.abs(x).max() / 127.5, 8)), abs=0.02)
    # A sample stands for all: half of the rows, the same ratio but for chance.
    half = rounding.ratios([first, seen_of(small, sample=200)], transforms=False)
    assert half[rounding.PLAIN]["int8 per tensor"] == pytest.approx(both, abs=0.5)


def test_exact_and_empty_rounding() -> None:
    exact = seen_of(torch.zeros(3, 4), sample=3)
    assert rounding.ratios([exact], transforms=False)[rounding.PLAIN]["int8 per token"] is None


def test_sets_as_naive() -> None:
    a, b = rows(300, 40, 1).double().numpy(), rows(200, 40, 2).double().numpy()
    peak = [np.abs(x).max(0) for x in (a, b)]
    mean = [(x**2).mean(0) for x in (a, b)]
    found = compared.by_channel(peak[0], mean[0], peak[1], mean[1])
    alive = [j for j in range(40) if peak[0][j] > 0]
    shift = np.mean([abs(math.log(peak[0][j] / peak[1][j])) for j in alive])
    assert found["range_shift"] == pytest.approx(shift)
    energy = np.mean([abs(math.log(mean[0][j] / mean[1][j])) / 2 for j in alive])
    assert found["energy_shift"] == pytest.approx(energy)
    assert found["spearman"] == pytest.approx(stats.spearmanr(mean[0], mean[1])[0])
    assert found["jaccard"] == 1.0
    h = [x.T @ x / len(x) for x in (a, b)]
    given = [torch.from_numpy(one).float() for one in h]
    both = compared.by_gram(*given, k=5)
    assert both["frobenius"] == pytest.approx(
        np.linalg.norm(h[0] - h[1]) / np.linalg.norm(h[0]), rel=1e-4
    )
    u = [np.linalg.svd(one)[0][:, :5] for one in h]
    cosines = np.linalg.svd(u[0].T @ u[1])[1]
    expected = math.sqrt(np.mean(np.sin(np.arccos(np.clip(cosines, 0, 1))) ** 2))
    assert both["angles"] == pytest.approx(expected, abs=1e-3)
    values = np.linalg.eigvalsh(h[0])
    share = values.sum() ** 2 / (values**2).sum() / 40
    assert compared.rank_share(given[0]) == pytest.approx(share, rel=1e-4)


def test_iteration_finds_the_leading_subspace() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 300, generator=generator) * torch.logspace(0, -2, 300)
    x = x @ torch.linalg.qr(torch.randn(300, 300, generator=generator))[0]
    h = x.t() @ x / len(x)
    exact = torch.linalg.eigh(h.double())[1][:, -16:].float()
    assert compared.angles(compared.leading(h, 16), exact) < 0.02
    other = torch.linalg.eigh(h.double())[1][:, :16].float()
    assert compared.angles(compared.leading(h, 16), other) > 0.999


def test_top_channels() -> None:
    peak = np.array([1.0, 5.0, 5.0, 0.0, 3.0])
    assert compared.top_channels(peak) == {1}
    assert compared.top_channels(peak, 0.6) == {1, 2, 4}
    assert compared.top_channels(np.zeros(4)) == set()
    assert compared.by_channel(*[np.zeros(4)] * 4)["jaccard"] is None
    assert compared.dimensions(8, 100, 100) == 2
    assert compared.dimensions(800, 5, 100) == 5


def input_of(block: int, name: str = "q_proj", expert: int | None = None) -> Input:
    tail = name if expert is None else f"experts.{expert}.{name}"
    return Input(f"b.{block}.{tail}", name, (f"b.{block}.{tail}",), block, 6, True, expert)


def test_outlier_features_as_counted_by_hand() -> None:
    parts = []
    table = torch.zeros(8, 100, 6)
    table[:2, 50:62, 1] = 6.0  # a quarter of the blocks, 24 of 800 positions: too few
    table[:2, 50:100, 2] = -7.0  # a quarter of the blocks, 100 of 800 positions
    table[0, :, 3] = 50.0  # one block only
    table[:, ::10, 4] = 6.5  # all blocks, a tenth of the positions
    table[:, :, 5] = 5.9
    for block in range(8):
        seen = Seen(6)
        seen.update(table[block], torch.zeros(100, dtype=torch.int64), torch.zeros(100).double())
        parts.append((input_of(block), seen))
    found = outlier_features(parts)
    assert [(e["channel"], e["blocks"], e["positions"], e["amax"]) for e in found] == [
        (2, 0.25, 0.125, 7.0),
        (4, 1.0, 0.1, 6.5),
    ]
    assert outlier_features([]) == []


def test_idle_experts() -> None:
    inputs = [input_of(0, part, e) for e in range(4) for part in ("gate_up_proj", "down_proj")]
    tokens = dict(zip([one.name for one in inputs], [0, 0, 100, 100, 95, 95, 5, 5], strict=True))
    found = idle_experts(inputs, tokens)
    assert found == [
        {"expert": "b.0.experts.0", "tokens": 0, "even": 50.0},
    ]
    assert idle_experts([input_of(0)], {"b.0.q_proj": 0}) == []


def test_the_median_token_sees_what_a_huge_value_hides() -> None:
    tensor = rows(101, 32, heavy=False)
    tensor[0, 5] = 5000.0
    x = tensor.double().numpy()
    found = rounding.ratios([seen_of(tensor, sample=200)], transforms=False)
    rounded = naive_int(x, 5000 / 127.5, 8)
    assert found[rounding.PLAIN]["int8 per tensor"] == pytest.approx(decibels(x, rounded), abs=0.05)
    assert found[rounding.PLAIN]["int8 per tensor"] > 30
    single = sorted(decibels(a, b) for a, b in zip(x, rounded, strict=True))
    median = found[rounding.PLAIN + rounding.MEDIAN]["int8 per tensor"]
    assert median == pytest.approx(single[50], abs=0.05)
    assert median == pytest.approx(0, abs=0.05)
    each = naive_int(x, np.abs(x).max(1, keepdims=True) / 127.5, 8)
    single = sorted(decibels(a, b) for a, b in zip(x, each, strict=True))
    median = found[rounding.PLAIN + rounding.MEDIAN]["int8 per token"]
    assert median == pytest.approx(single[50], abs=0.05)
