"""Compiled sweeps on a CUDA device, against a loop in float64 and the path in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lm_calib_plugin import kernels
from lm_calib_plugin.kernels import sweeps
from lm_calib_plugin.statistics import Gram
from tests.kernels.checks import cases
from tests.methods import method_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("compiled", [True, False])
def test_both_paths_are_the_loop(name: str, compiled: bool) -> None:
    if compiled:
        pytest.importorskip("triton")
    cases()[name]("cuda", compiled)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sparsegpt", {"sparsity": 0.5}),
        ("sparsegpt", {"sparsity": 0.5, "pattern": "2:4"}),
        ("gptq", {"bits": 4, "group_size": 64}),
        ("gptq", {"bits": 3, "group_size": 64, "symmetric": False}),
    ],
    ids=str,
)
def test_methods_reach_the_same_error_with_and_without_kernels(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    own = torch.Generator().manual_seed(0)
    weight = torch.randn(1030, 512, generator=own).cuda()
    mix = torch.eye(512) + torch.randn(512, 512, generator=own) / 40
    stats = Gram(512, device="cuda")
    stats.update((torch.randn(4096, 512, generator=own) @ mix).cuda())
    method, gram = method_of(name, **options), stats.gram().double()
    assert kernels.compiled_on(weight)
    errors = []
    for compiled in (True, False):
        monkeypatch.setattr(sweeps, "compiled_on", lambda tensor, c=compiled: c)
        found = method.compress(weight, stats).weight
        change = (found - weight).double()
        errors.append(float(((change @ gram) * change).sum()))
    # Ties and roundings at half a step may fall differently; what is reached is the same.
    assert abs(errors[0] - errors[1]) < 1e-3 * errors[1]
