"""Divergences against naive float64 numpy, and what must hold for any pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lm_calib_plugin.diagnostics import tokens
from lm_calib_plugin.diagnostics.tokens import LN2, token_divergence


def naive(p_logits: np.ndarray, q_logits: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - x.max(-1, keepdims=True) - np.log(
            np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)
        )  # fmt: skip

    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    p, q = np.exp(log_p), np.exp(log_q)
    m = (p + q) / 2
    rows = np.arange(len(targets))
    return {
        "js": 0.5 * (p * np.log(p / m)).sum(-1) + 0.5 * (q * np.log(q / m)).sum(-1),
        "kl": (p * (log_p - log_q)).sum(-1),
        "tv": 0.5 * np.abs(p - q).sum(-1),
        "flipped": (p.argmax(-1) != q.argmax(-1)).astype(float),
        "nll_dense": -log_p[rows, targets],
        "nll_compressed": -log_q[rows, targets],
    }


def pair(seed: int, noise: float, shape: tuple[int, int] = (37, 211)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    dense = 3 * torch.randn(shape, generator=generator)
    other = dense + noise * torch.randn(shape, generator=generator)
    return dense, other, torch.randint(shape[1], (shape[0],), generator=generator)


@pytest.mark.parametrize("noise", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("chunk", [2**24, 500])
def test_as_naive(noise: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_CHUNK", chunk)
    dense, other, targets = pair(0, noise)
    found = token_divergence(dense, other, targets)
    expected = naive(dense.double().numpy(), other.double().numpy(), targets.numpy())
    for name, values in expected.items():
        got = getattr(found, name).numpy()
        np.testing.assert_allclose(got, values, rtol=2e-4, atol=3e-7, err_msg=name)


def test_identical_models_differ_by_exactly_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        dense, _, targets = pair(1, 0.0)
        found = token_divergence(dense.to(dtype), dense.to(dtype).clone(), targets)
        for name in ("js", "kl", "tv", "flipped"):
            assert torch.equal(getattr(found, name), torch.zeros(37, dtype=torch.float64)), name
        assert torch.equal(found.nll_dense, found.nll_compressed)


def test_bounds_and_symmetry() -> None:
    dense, other, targets = pair(2, 30.0)
    there, back = token_divergence(dense, other, targets), token_divergence(other, dense, targets)
    assert float(there.js.max()) <= LN2
    assert float(there.tv.max()) <= 1 + 1e-6
    torch.testing.assert_close(there.js, back.js, rtol=1e-5, atol=1e-7)
    # Pinsker: total variation is at most sqrt(KL / 2).
    assert bool((there.tv <= (there.kl / 2).sqrt() + 1e-5).all())


def test_disjoint_distributions_reach_the_bound() -> None:
    dense = torch.tensor([[0.0, -math.inf, -math.inf], [50.0, -50.0, 0.0]])
    other = torch.tensor([[-math.inf, 0.0, -math.inf], [-50.0, 50.0, 0.0]])
    found = token_divergence(dense, other, torch.tensor([0, 1]))
    torch.testing.assert_close(found.js, torch.full((2,), LN2, dtype=torch.float64))
    assert found.kl[0] == math.inf
    assert found.flipped.tolist() == [1.0, 1.0]


def test_shapes_that_do_not_fit_are_refused() -> None:
    dense, other, targets = pair(3, 0.1)
    with pytest.raises(ValueError, match="one shape"):
        token_divergence(dense, other[:, :-1], targets)
    with pytest.raises(ValueError, match="target each"):
        token_divergence(dense, other, targets[:-1])
