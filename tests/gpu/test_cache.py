"""A model on a CUDA device that was loaded from the cache is the one that was compressed there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lm_calib_plugin import Recipe, Runtime, compress
from tests.artifacts.test_cache import FAMILIES, calibration
from tests.tiny import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", ["gptq", "smoothquant", "rotation", "depth_term", "flap", "kv"])
def test_a_hit_is_a_miss_on_the_device(family: str, tmp_path: Path) -> None:
    given, name = FAMILIES[family]
    found: list[Any] = []
    for number in range(2):
        model = make_model(name).to("cuda")
        runtime = Runtime(progress=False, cache=str(tmp_path))
        report = compress(model, None, Recipe(**given), runtime, calibration())
        assert report.cache is not None
        assert report.cache["hit"] is bool(number)
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        assert {grid.scale.device.type for grid in report.grids.values()} <= {"cuda"}
        with torch.no_grad():
            logits = model(torch.arange(3, 19, device="cuda")[None]).logits
        found.append((report.weights_digest, report.report_sha256, logits))
    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2])
