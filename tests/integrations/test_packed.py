"""Packed folders: written by ``CalibQuantizer``, unfolded by the library, found to be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lm_calib_plugin import CalibModelForCausalLM, CalibQuantizer
from tests.tiny import saved_model

DATA: dict[str, Any] = {"calibration": "random", "nsamples": 4, "seqlen": 16, "progress": False}
RECIPES: list[dict[str, Any]] = [
    {"method": "rtn", "bits": 4, "group_size": 32},
    {"method": "gptq", "scheme": "W4A16", "group_size": 32, **DATA},
    {"method": "awq", "bits": 4, "group_size": 32, **DATA},
    {"method": "rotation", "bits": 8, "group_size": -1, **DATA},
    {"method": "rtn", "scheme": "W8A8"},
    {"method": "rtn", "scheme": "W8A8_static", **DATA},
    {"method": "rtn", "scheme": "FP8_static", **DATA},
    {"method": "rtn", "bits": 8, "group_size": -1, "overrides": {"*down_proj": {"bits": 16}}},
    {"method": "wanda+gptq", "sparsity": 0.5, "bits": 4, "group_size": 32, **DATA},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_packed_weights_are_found_to_be_those_evaluated(
    recipe: dict[str, Any], dtype: torch.dtype, tmp_path: Path, capsys: Any
) -> None:
    folder = saved_model(tmp_path / "base", "llama_tied", hidden_size=64, intermediate_size=128)
    quantizer = CalibQuantizer.from_pretrained(folder, dtype=dtype)
    quantizer.quantize(tmp_path / "out", **recipe)
    assert quantizer.exported.format == "compressed-tensors"
    model = CalibModelForCausalLM.from_pretrained(tmp_path / "out")
    told = capsys.readouterr().err
    assert "format compressed-tensors" in told
    assert "weights are those that were evaluated" in told
    assert model.dtype == dtype
