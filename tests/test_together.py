"""Options of single layers, and pruning with quantization: what is done, and what it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.compression import compress
from lm_calib_plugin.engine.kv_cache import kv_bits
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import Report
from lm_calib_plugin.runtime import Runtime
from tests.tiny import make_model, make_tokenizer, random_ids


def done(folder: Path, **given: Any) -> tuple[Any, Report]:
    """Compress a tiny model; the model and the report."""
    recipe = Recipe(**{"group_size": 16, **given})
    model, data = make_model("llama"), None
    if recipe.terms and recipe.calibration is None:
        data = CalibrationSet.of([ids.tolist() for ids in random_ids([16] * 20)], seqlen=16)
    runtime = Runtime(progress=False, report_dir=str(folder))
    return model, compress(model, make_tokenizer(), recipe, runtime, data)


def test_key_tells_what_holds_in_every_layer(tmp_path: Path) -> None:
    def key(**overrides: Any) -> str:
        return done(tmp_path, method="rtn", overrides=overrides or None)[1].key

    plain, wide, narrow = {"bits": 4}, {"bits": 8}, {"bits": 3}
    assert key(**{"*down_proj": plain}) == key()
    assert key(**{"*down_proj": wide}) == key(**{"*mlp.down_proj": wide}) != key()
    first = key(**{"*down_proj": wide, "*_proj": narrow})
    assert first == key(**{"*down_proj": wide, "*_proj": narrow, "*up_proj": wide})
    # The first pattern that fits counts: turned around, the second one has no effect.
    turned = key(**{"*_proj": narrow, "*down_proj": wide})
    assert turned == key(**{"*_proj": narrow}) != first


def test_layers_named_by_a_pattern_have_options_of_their_own(tmp_path: Path) -> None:
    overrides = {"*down_proj": {"bits": 8}, "*o_proj": {"bits": 16}, "1.*": {"symmetric": False}}
    dense = dict(make_model("llama").named_parameters())
    model, report = done(tmp_path, method="rtn", bits=3, overrides=overrides)
    for row in report.layers:
        weight = model.get_parameter(f"{row.name}.weight").detach()
        wide, left = row.name.endswith("down_proj"), row.name.endswith("o_proj")
        assert torch.equal(weight, dense[f"{row.name}.weight"]) == left
        if not left:
            levels = [len(set(group.tolist())) for group in weight.reshape(-1, 16)]
            assert max(levels) <= 2 ** (8 if wide else 3)
            assert (max(levels) > 2**3) == wide


def test_a_joint_method_prunes_quantizes_and_rounds_cached_values(tmp_path: Path) -> None:
    model, report = done(
        tmp_path, method="wanda+gptq", pattern="2:4", kv_bits=4, overrides={"*up_proj": {"bits": 8}}
    )
    assert kv_bits(model) == 4
    for row in report.layers:
        weight = model.get_parameter(f"{row.name}.weight").detach()
        assert int((weight.reshape(-1, 4) != 0).sum(dim=1).max()) <= 2
        assert row.bits == (8 if row.name.endswith("up_proj") else 4)
    again = Recipe(**{k: v for k, v in report.recipe.items() if k not in ("calibration",)})
    assert (
        again.make_method()
        == Recipe(
            method="wanda+gptq", pattern="2:4", kv_bits=4, group_size=16, overrides=again.overrides
        ).make_method()
    )


@pytest.mark.parametrize("name", ["sparsegpt+gptq", "wanda+rtn"])
def test_a_mixture_serves_a_joint_method(tmp_path: Path, name: str) -> None:
    mixture = {"calibration": "minimax(random+null:ascii)", "nsamples": 8, "seqlen": 16}
    _, report = done(tmp_path, method=name, sparsity=0.5, **mixture)
    assert report.achieved["bits"] == 4
    assert report.achieved["sparsity"] >= 0.5


def test_a_ridge_that_a_mixture_finds_is_that_of_every_layer(tmp_path: Path) -> None:
    mixture = {"calibration": "minimax(random+null:ascii)", "nsamples": 8, "seqlen": 16}
    _, report = done(tmp_path, **{"method": "gptq", **mixture})
    assert {row.damp for row in report.layers} == {report.recipe["damp"]}
    # A bank judges every layer at one width.
    given = {"method": "gptq", "overrides": {"*down_proj": {"bits": 8}}, **mixture}
    with pytest.raises(UserError, match="overrides"):
        done(tmp_path, **given)
