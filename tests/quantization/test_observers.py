"""Limits that observers choose from a histogram, against the values themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.activations import ActivationSpec
from lm_calib_plugin.quantization.observers.minmax import MinMax
from lm_calib_plugin.quantization.observers.mse import MSE
from lm_calib_plugin.quantization.observers.percentile import Percentile
from lm_calib_plugin.quantization.parts import Observer
from lm_calib_plugin.statistics import Ranges

WIDTH, LENGTH = 32, 25
SPEC = ActivationSpec("int", 8, dynamic=False)
BOTH = pytest.mark.parametrize("first", [True, False])


def sequences(count: int = 12, seed: int = 0) -> Tensor:
    """Heavy tails, and first tokens that are much larger than all others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, LENGTH, WIDTH, generator=generator)
    x = x * torch.rand(x.shape, generator=generator).add(0.05).reciprocal()
    x[:, 0, 3] *= 40
    return x


def ranges_of(x: Tensor) -> Ranges:
    ranges = Ranges(WIDTH)
    owners = torch.arange(len(x)).repeat_interleave(x.shape[1])
    ranges.update(x.reshape(-1, WIDTH), owners=owners)
    return ranges


@BOTH
def test_minmax_is_the_largest_value(first: bool) -> None:
    x = sequences()
    counted = x if first else x[:, 1:]
    assert MinMax(first).limit(ranges_of(x), SPEC) == float(counted.abs().max())


@BOTH
@pytest.mark.parametrize("q", [50.0, 99.0, 99.9, 100.0])
def test_percentile_is_that_of_the_values(q: float, first: bool) -> None:
    x = sequences()
    counted = (x if first else x[:, 1:]).double().abs().numpy()
    exact = float(np.quantile(counted, q / 100, method="inverted_cdf"))
    assert Percentile(q, first).limit(ranges_of(x), SPEC) == pytest.approx(exact, rel=1 / 64)


def naive_error(x: Tensor, limit: float, bits: int) -> float:
    scale = limit / (2**bits - 1) * 2
    levels = np.clip(np.round(x.double().numpy() / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float(np.square(levels * scale - x.double().numpy()).sum())


@BOTH
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_is_as_good_as_trying_all_limits_on_the_values(bits: int, first: bool) -> None:
    x = sequences(40)
    counted = x if first else x[:, 1:]
    found = MSE(first).limit(ranges_of(x), ActivationSpec("int", bits, dynamic=False))
    largest = float(counted.abs().max())
    tried = np.linspace(0.2, 1, 100) * largest
    errors = [naive_error(counted, limit, bits) for limit in tried]
    assert 0.2 * largest * 0.999 <= found <= largest
    assert naive_error(counted, found, bits) <= 1.02 * min(errors)
    # The choice matters: the whole range is worse.
    if bits < 8:
        assert min(errors) < 0.95 * errors[-1]


def test_mse_of_fp8_never_loses_to_minmax() -> None:
    x, spec = sequences(), ActivationSpec("fp8", dynamic=False)

    def error(limit: float) -> float:
        return float((spec.round(x, torch.tensor(limit)) - x).double().square().sum())

    ranges = ranges_of(x)
    assert error(MSE().limit(ranges, spec)) <= 1.01 * error(MinMax().limit(ranges, spec))


@pytest.mark.parametrize("observer", [MinMax(), MinMax(False), Percentile(), MSE(), MSE(False)])
def test_limits_are_positive(observer: Observer) -> None:
    assert observer.limit(ranges_of(torch.zeros(2, 3, WIDTH)), SPEC) == 1
    assert observer.limit(Ranges(WIDTH), SPEC) > 0
    rare = torch.zeros(20, 100, WIDTH)
    rare[3, 1, 4] = 5.0
    assert 0 < observer.limit(ranges_of(rare), SPEC) <= 5


def test_options_are_checked() -> None:
    assert Percentile.from_texts({"q": "99", "first": "false"}) == Percentile(99.0, False)
    for q in ("0", "101", "-3"):
        with pytest.raises(UserError, match="0 < q <= 100"):
            Percentile.from_texts({"q": q})
    with pytest.raises(UserError, match="steps >= 1"):
        MSE(steps=0)
    with pytest.raises(UserError, match="0 < lowest <= 1"):
        MSE(lowest=0.0)
    with pytest.raises(UserError, match="observer=minmax"):
        MSE().limit(ranges_of(sequences()), ActivationSpec("nvfp4", dynamic=False))
