"""A compressed model on packed kernels: what is asked before, and what the report says."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import lm_calib_plugin.packed as module
from lm_calib_plugin import engine
from lm_calib_plugin.compression import compress
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.execution import available, unpack
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import Report
from lm_calib_plugin.runtime import Runtime
from tests.tiny import make_model

HERE = available("cpu", torch.float32)
packable = pytest.mark.skipif("scheme=W8A8" not in HERE, reason="no int8 kernel on this CPU")


def done(folder: Path, **given: Any) -> tuple[Any, Report]:
    model = make_model("llama")
    runtime = Runtime(report_dir=str(folder), progress=False)
    return model, compress(model, None, Recipe(method="rtn", **given), runtime)


@packable
def test_a_packed_model_is_reported_and_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiny layers are never faster: force them.
    monkeypatch.setattr(module, "pack", functools.partial(module.pack, force=True))
    simulated, plain = done(tmp_path, scheme="W8A8")
    model, report = done(tmp_path, scheme="W8A8", execution="packed")
    found = report.summary()["execution"]
    assert found["layers_packed"] == 21
    assert found["weight_bytes_after"] < found["weight_bytes_before"]
    assert found["logits_difference"] < 0.1
    assert report.key != plain.key
    # The levels stand for the very weights of the simulated model.
    assert report.weights_digest == plain.weights_digest == engine.weights_digest(model)
    assert all(row.execution["kernel"] == "int8_cpu" for row in report.layers)
    assert "21 of 21 layers packed" in report.line()
    assert unpack(model) == 21
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model(ids).logits, simulated(ids).logits)


@packable
def test_slower_kernels_leave_the_model_simulated_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.pack

    def always_slower(*given: Any, **named: Any) -> Any:
        return original(*given, **{**named, "racer": lambda *_: module.Race(1.0, 2.0)})

    monkeypatch.setattr(module, "pack", always_slower)
    _, report = done(tmp_path, scheme="W8A8", execution="packed")
    assert report.summary()["execution"]["layers_packed"] == 0
    assert report.summary()["execution"]["logits_difference"] == 0
    assert any("packed none of 21 layers" in note for note in report.warnings)


def test_a_scheme_without_a_kernel_is_refused_before_any_work(tmp_path: Path) -> None:
    for given in ({"scheme": "FP8"}, {"bits": 3, "group_size": 16}, {"scheme": "MXFP4"}):
        model = make_model("llama", hidden_size=64, intermediate_size=64)
        before = engine.weights_digest(model)
        recipe = Recipe(method="rtn", execution="packed", **given)
        with pytest.raises(UserError, match="use execution=simulated"):
            compress(model, None, recipe, Runtime(report_dir=str(tmp_path), progress=False))
        assert engine.weights_digest(model) == before
