"""The parts of a quantization method together: what they need, say, and leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lm_calib_plugin import Recipe, compress
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.quantization.grids import GridSpec
from lm_calib_plugin.schemes import SCHEMES
from lm_calib_plugin.statistics import STATISTICS
from tests.engine.test_walk import QUIET, calibration, flat
from tests.methods import method_of
from tests.quantization.test_gptq import gram_of, problem
from tests.tiny import make_model

METHODS = ["rtn", "gptq", "gptq_heldout", "awq", "smoothquant", "rotation", "autoround", "hqq"]


def made(name: str, **options: Any) -> Any:
    return method_of(name, **({"symmetric": False} if name == "hqq" else {}), **options)


@pytest.mark.parametrize("name", METHODS)
def test_sixteen_bits_need_nothing_of_weights(name: str) -> None:
    off = {"transform": "none"} if name in ("awq", "smoothquant", "rotation") else {}
    method = made(name, bits=16, act_bits=16, **off)
    assert method.does_nothing
    assert method.keeps_weights
    assert method.statistic == "none"
    assert method.parts == ()
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    found = method.compress(weight, None)
    assert torch.equal(found.weight, weight)
    assert found.grid is None
    assert found.weight.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize(
    "changes",
    [{"act_bits": 8}, {"kv_bits": 8}, {"transform": "smoothquant"}, {"transform": "rotation"}],
    ids=str,
)
def test_sixteen_bits_beside_something_else_do_something(changes: dict[str, Any]) -> None:
    method = made("rtn", bits=16, **changes)
    assert method.keeps_weights
    assert not method.does_nothing


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_a_scheme_is_its_options_written_out(name: str) -> None:
    scheme = SCHEMES[name]
    short = made("rtn", scheme=name)
    assert (short.bits, short.group_size, short.symmetric) == (
        scheme.bits,
        scheme.group_size,
        scheme.symmetric,
    )
    assert (short.act_bits, short.act_dynamic) == (scheme.act_bits, scheme.act_dynamic)
    assert short.spec.number == scheme.number
    if scheme.act_bits is None:
        assert short.activations is None
    else:
        assert short.activations.number == scheme.number
        assert short.activations.dynamic == scheme.act_dynamic
    if scheme.number == "int":
        long = made(
            "rtn",
            bits=scheme.bits,
            group_size=scheme.group_size,
            act_bits=scheme.act_bits,
            act_dynamic=scheme.act_dynamic,
        )
        assert long.identity() == short.identity()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("grid", ["minmax", "mse", "clip"])
def test_statistics_asked_for_are_enough(name: str, grid: str) -> None:
    """A method works with what it says it needs, and refuses to work with nothing instead."""
    options = {"bits": 4, "group_size": 8}
    if name != "hqq":
        options |= {"grid": grid}
    method = made(name, **options)
    weight, x = problem(4, 16, 3)
    tensor, stats = torch.from_numpy(weight).float(), None
    if method.statistic != "none":
        stats = STATISTICS[method.statistic].empty(16)
        stats.update(torch.from_numpy(x))
        if method.uses_heldout:
            stats.heldout = STATISTICS[method.statistic].empty(16)
            stats.heldout.update(torch.from_numpy(x))
        needs = [p for p in method.parts if p.statistic != "none"]
        with pytest.raises(ValueError, match="needs statistics"):
            method.compress(tensor, None)
        assert needs
    found = method.compress(tensor, stats)
    assert found.grid.holds(found.weight)


def test_a_range_that_is_kept_for_queries_and_keys() -> None:
    """The search by output error leaves queries and keys out; names are whole tails."""
    method = made("gptq", bits=3, group_size=8, grid="clip")
    weight, x = problem(4, 16, 3)
    tensor, stats = torch.from_numpy(weight).float(), gram_of(x)
    whole = GridSpec(bits=3, group_size=8).fit(tensor).scale
    for name, kept in (
        ("model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn.k_proj", True),
        ("model.layers.0.self_attn.v_proj", False),
        ("model.layers.0.self_attn.vq_proj", False),
    ):
        grid = method.for_layer(name).fit_grid(tensor, stats, torch.float32)
        assert torch.equal(grid.scale, whole) == kept, name


def test_labels_and_options_are_complete() -> None:
    method = made("awq", bits=3, group_size=8, rounding="gptq", grid="clip?steps=3", damp=0.2)
    assert method.label == "awq+gptq"
    options = method.options()
    assert options["damp"] == 0.2
    assert options["grid"].startswith("clip?steps=3")
    assert options["rounding"] == "gptq"
    assert made("awq", **options).options() == options
    assert "damp" not in made("rtn").options()
    assert made("gptq", damp="auto").options()["damp"] == "auto"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "rtn", "correction": 0.5}, "correction"),
        ({"method": "autoround", "scheme": "FP8"}, "autoround learns offsets"),
        ({"method": "rtn", "scheme": "W4A16", "bits": 3}, "scheme=W4A16 has bits=4"),
        ({"method": "rtn", "observer": "minmax"}, "no range of an activation"),
        ({"method": "rtn", "act_dynamic": False}, "no activation is quantized"),
        ({"method": "rtn", "group_size": 7}, "group_size: 7 does not divide"),
        ({"method": "gptq", "true_sequential": True, "propagate": "dense"}, "true_sequential"),
        ({"method": "rtn", "bits": 9}, "bits: got 9"),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_what_cannot_be_is_refused_before_any_work(options: dict[str, Any], match: str) -> None:
    model = make_model()
    with pytest.raises(UserError, match=match):
        compress(model, None, Recipe(**options), QUIET, calibration())
    assert torch.equal(flat(model), flat(make_model()))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_static", "FP8", "MXFP4", "NVFP4"])
@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_schemes_through_a_model(name: str, scheme: str) -> None:
    """Levels of every stored weight, counted; the model still computes numbers."""
    model = make_model(hidden_size=64, intermediate_size=96)
    report = compress(model, None, Recipe(method=name, scheme=scheme), QUIET, calibration())
    bits = SCHEMES[scheme].bits
    assert report.achieved["bits"] == bits
    size = {"NVFP4": 16, "MXFP4": 32}.get(scheme)
    for block in model.model.layers:
        weight = block.mlp.up_proj.weight.detach()
        groups = weight.reshape(-1, size or weight.shape[1])
        assert max(len(group.unique()) for group in groups) <= 2**bits
    with torch.no_grad():
        assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_what_a_row_of_the_report_says() -> None:
    """Stored bits and scales of one layer, from the definition."""
    model, dense = make_model(), make_model()
    report = compress(model, None, Recipe(method="rtn", bits=4, group_size=8), QUIET)
    for row in report.layers:
        weight = dense.get_submodule(row.name).weight.detach()
        scales = (weight.reshape(-1, 8).abs().amax(1) / 7.5).sort().values
        assert row.stored_bits == 4 + 32 / 8
        assert row.scale_min == pytest.approx(float(scales[0]))
        assert row.scale_max == pytest.approx(float(scales[-1]))
        assert row.scale_median == pytest.approx(float(scales[len(scales) // 2]))
        assert row.clipped == 0
    assert report.achieved["bits_stored"] == 8.0
    sizes = [row.shape[0] * row.shape[1] for row in report.layers]
    assert report.achieved["bytes"] == sum(sizes)
