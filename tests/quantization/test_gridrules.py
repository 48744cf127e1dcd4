"""Range searches against slow loops over every row, group and factor in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.gridrules.clip import Clip
from lm_calib_plugin.quantization.gridrules.minmax import MinMax
from lm_calib_plugin.quantization.gridrules.mse import MSE
from lm_calib_plugin.quantization.grids import Grid, GridSpec
from lm_calib_plugin.statistics import Gram

SPECS = [
    GridSpec("int", 3, 16, True),
    GridSpec("int", 4, -1, True),
    GridSpec("int", 2, 32, False),
    GridSpec("fp8", 8, 16),
    GridSpec("nvfp4", 4, 16),
    GridSpec("mxfp4", 4, 32),
]


def weights(rows: int = 5, width: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # The third power has the heavy tails for which clipping pays.
    return torch.randn(rows, width, generator=generator) ** 3


def gram_of(width: int, tokens: int = 40, seed: int = 1) -> Gram:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    stats = Gram.empty(width)
    stats.update(torch.randn(tokens, width, generator=generator) @ mix)
    return stats


def group_errors(weight: Tensor, grid: Grid, gram: Tensor) -> np.ndarray:
    """``d G_gg d^T`` of every row and group, float64."""
    d = (grid.round(weight) - weight).double().numpy()
    g, size = gram.double().numpy(), grid.group_size
    found = np.zeros((d.shape[0], d.shape[1] // size))
    for i in range(d.shape[0]):
        for k in range(d.shape[1] // size):
            part = slice(k * size, (k + 1) * size)
            found[i, k] = d[i, part] @ g[part, part] @ d[i, part]
    return found


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_minmax_is_the_grid_of_the_whole_range(spec: GridSpec) -> None:
    w = weights()
    grid = MinMax().fit(w, spec, None, torch.bfloat16)
    assert torch.equal(grid.scale, spec.fit(w, torch.bfloat16).scale)
    assert MinMax().applies_to("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [MSE(), Clip(), MSE(7, 0.3), Clip(3, 0.9)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_group_has_the_best_of_all_factors(
    spec: GridSpec, rule: MSE | Clip, dtype: torch.dtype
) -> None:
    for seed in range(2):
        w = weights(seed=seed)
        before = w.clone()
        stats = gram_of(64)
        measure = stats.gram() if isinstance(rule, Clip) else torch.eye(64)
        factors = np.linspace(1, rule.low, rule.steps + 1)
        grids = [spec.fit(w, dtype, torch.tensor(f, dtype=torch.float32)) for f in factors]
        all_errors = np.stack([group_errors(w, grid, measure) for grid in grids])
        found = rule.fit(w, spec, stats, dtype)
        reached = group_errors(w, found, measure)
        np.testing.assert_allclose(reached, all_errors.min(axis=0), rtol=1e-4, atol=1e-7)
        assert (reached <= all_errors[0] * (1 + 1e-5) + 1e-9).all()
        assert torch.equal(w, before)
        assert found.holds(found.round(w).to(dtype))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_clip_without_tokens_is_mse(spec: GridSpec) -> None:
    w = weights()
    clip = Clip().fit(w, spec, Gram.empty(64), torch.float32)
    assert torch.equal(clip.scale, MSE().fit(w, spec, None, torch.float32).scale)


def test_the_whole_range_wins_among_equals() -> None:
    spec = GridSpec("int", 4, 8, symmetric=False)
    levels = torch.tensor([[7.0, -8, 3, 1, 0, 2, -5, 4]]) * 0.5
    for w in (torch.zeros(2, 8), levels):
        assert torch.equal(MSE().fit(w, spec, None, torch.float32).scale, spec.fit(w).scale)


def test_rows_do_not_see_each_other() -> None:
    w, stats = weights(), gram_of(64)
    for rule in (MSE(), Clip()):
        spec = GridSpec("int", 3, 16)
        whole = rule.fit(w, spec, stats, torch.float32).round(w)
        part = rule.fit(w[1:3], spec, stats, torch.float32).round(w[1:3])
        assert torch.equal(whole[1:3], part)


def test_clipping_pays_where_tails_are_heavy() -> None:
    w, spec = weights(32, 128), GridSpec("int", 3, -1)
    errors = [
        float((rule.fit(w, spec, None, torch.float32).round(w) - w).square().sum())
        for rule in (MinMax(), MSE())
    ]
    assert errors[1] < 0.9 * errors[0]


def test_layers_are_left_out_by_the_tail_of_their_name() -> None:
    rule = Clip()
    assert not rule.applies_to("model.layers.3.self_attn.q_proj")
    assert not rule.applies_to("k_proj")
    assert rule.applies_to("model.layers.3.self_attn.v_proj")
    assert rule.applies_to("model.layers.3.self_attn.xq_proj")
    assert Clip(skip="none").applies_to("model.layers.3.self_attn.q_proj")
    other = Clip.from_texts({"skip": "attn.c_attn+up_proj"})
    assert not other.applies_to("transformer.h.0.attn.c_attn")
    assert other.applies_to("c_attn")
    assert not other.applies_to("mlp.up_proj")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low": "0"}, "low >= 0.01"),
        ({"low": "1.5"}, "low <= 1"),
        ({"steps": "-1"}, "steps >= 0"),
        ({"skip": "q_proj+"}, "tails of layer names"),
    ],
)
def test_bad_options_are_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Clip.from_texts(options)
