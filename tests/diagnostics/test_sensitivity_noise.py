"""The ruler: noise is as large as it says, and the recipe lies where the compressed model is."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from lm_calib_plugin import compress, engine
from lm_calib_plugin.diagnostics.sensitivity import Judge, compress_twin, probe_noise
from lm_calib_plugin.diagnostics.sensitivity.curves import Point, size_at, slope_of, where_not
from lm_calib_plugin.diagnostics.sensitivity.noise_shown import noise_findings, noise_section
from lm_calib_plugin.diagnostics.sensitivity.perturb import (
    generator_of,
    input_noise,
    mirrored,
    noisy_inputs,
    weight_noise,
)
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import Recipe
from tests.diagnostics.sensitive import QUIET, RTN, assert_same, judge, state, trained
from tests.tiny import in_dtype, make_model, random_ids

SIZES = (0.03, 0.1, 0.3)


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "aligned"])
@pytest.mark.parametrize("size", [2**-8, 0.5])
def test_noise_on_weights_is_as_large_as_it_says(kind: str, size: float) -> None:
    weight = torch.randn(7, 40, generator=generator_of("w"))
    error = torch.randn(7, 40, generator=generator_of("e"))
    error[:, :5] = 0
    noise = weight_noise(weight, size, kind, generator_of("n"), error)
    relative = float(noise.double().norm() / weight.double().norm())
    assert relative == pytest.approx(size, rel=1e-6)
    if kind == "aligned":
        assert torch.equal(noise.sign(), error.sign())
    else:
        assert abs(float(noise.sign().mean())) < 0.2
    if kind == "uniform":
        assert float(noise.abs().max()) < 1.2 * math.sqrt(3) * float(noise.square().mean().sqrt())
    assert torch.equal(noise, weight_noise(weight, size, kind, generator_of("n"), error))
    assert not torch.equal(noise, weight_noise(weight, size, kind, generator_of("m"), error))


def test_nothing_is_added_where_there_is_nothing() -> None:
    nothing = torch.zeros(3, 8)
    weight = torch.ones(3, 8)
    assert not weight_noise(nothing, 0.5, "gaussian", generator_of("n")).any()
    assert not weight_noise(weight, 0.5, "aligned", generator_of("n"), nothing).any()


def test_noise_on_inputs_is_relative_to_each_token() -> None:
    x = torch.randn(2, 5, 16, generator=generator_of("x")) * torch.arange(5)[None, :, None]
    noise = input_noise(x, 0.25, "gaussian", generator_of("n"))
    torch.testing.assert_close(noise.norm(dim=-1), 0.25 * x.norm(dim=-1))
    assert not noise[:, 0].any()


@pytest.mark.parametrize(("name", "modules"), [("llama", 21), ("gpt2", 12), ("qwen3_moe", 15)])
def test_hooks_disturb_every_module_once_and_go(name: str, modules: int) -> None:
    model = make_model(name)
    layers = engine.find_layers(engine.find_blocks(model))[0]
    seen: dict[int, list[torch.Tensor]] = {}

    def look(number: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen.setdefault(number, []).append(x.clone())

        return hook

    own = [group[0].module for group in engine.by_module(layers)]
    assert len(own) == modules
    # Prepended hooks see what comes, the others what the noise made of it.
    before = [m.register_forward_pre_hook(look(i), with_kwargs=True) for i, m in enumerate(own)]
    ids = random_ids([9])[0][None]
    with torch.no_grad(), noisy_inputs(layers, 0.125, "uniform", 0):
        after = [
            m.register_forward_pre_hook(look(i + 100), with_kwargs=True) for i, m in enumerate(own)
        ]
        model(ids, use_cache=False)
    for hook in (*before, *after):
        hook.remove()
    for i in range(modules):
        (clean,), (noisy,) = seen[i], seen[i + 100]
        sizes = (noisy - clean).norm(dim=-1) / clean.norm(dim=-1)
        torch.testing.assert_close(sizes, torch.full_like(sizes, 0.125), rtol=1e-4, atol=0)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_two_seeds_are_one_noise_with_both_signs() -> None:
    assert [mirrored("gaussian", i) for i in range(4)] == [(0, 1), (0, -1), (1, 1), (1, -1)]
    assert [mirrored("aligned", i) for i in range(3)] == [(0, 1), (1, 1), (2, 1)]


def test_the_recipe_lies_where_the_compressed_model_is() -> None:
    model = make_model()
    before = state(model)
    run_of = compress_twin(model, None, RTN, QUIET)
    found = probe_noise(model, judge(), run_of, sizes=SIZES, progress=False)
    other = copy.deepcopy(model)
    compress(other, None, RTN, QUIET)
    assert found.actual is not None
    assert found.actual.scores.tolist() == judge().score(other).tolist()
    assert found.dense.tolist() == judge().score(model).tolist()
    moved = total = 0.0
    for layer in engine.find_layers(engine.find_blocks(model))[0]:
        mine = model.get_submodule(layer.name).weight.detach().double()
        gap = other.get_submodule(layer.name).weight.detach().double() - mine
        assert found.actual.layers[layer.name] == pytest.approx(float(gap.norm() / mine.norm()))
        moved, total = moved + float(gap.square().sum()), total + float(mine.square().sum())
    assert found.actual.size == pytest.approx(math.sqrt(moved / total))
    assert [c.kind for c in found.curves] == ["gaussian", "aligned"]
    assert_same(before, model)


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "llama"])
def test_points_are_those_of_models_disturbed_by_hand(name: str) -> None:
    """Other weights, written into a copy of the model, give the same loss."""
    model = make_model(name)
    found = probe_noise(model, judge(), layers=("mlp",), seeds=3, sizes=SIZES, progress=False)
    other = copy.deepcopy(model)
    own = [x for x in engine.find_layers(engine.find_blocks(other))[0] if ".mlp." in x.name]
    assert found.layers == [x.name for x in own]
    dense = {x.name: x.read() for x in own}
    for point in found.curves[0].points:
        for seed in range(3):
            for x in own:
                drawn = generator_of("weights", "gaussian", seed // 2, x.name)
                noise = weight_noise(dense[x.name], point.size, "gaussian", drawn)
                x.write(dense[x.name] + (-1) ** seed * noise)
            gap = judge().mean(judge().score(other) - found.dense)
            assert point.each[seed] == pytest.approx(gap, abs=1e-6)
        assert point.stored == pytest.approx(point.size, rel=1e-5)
        assert point.value == pytest.approx(sum(point.each) / 3, abs=1e-9)
    again = probe_noise(model, judge(), layers=("mlp",), seeds=3, sizes=SIZES, progress=False)
    assert again.plain() == found.plain()


def test_seeds_do_not_touch_the_random_state() -> None:
    before = torch.get_rng_state()
    probe_noise(make_model(), judge(), place="inputs", sizes=SIZES, seeds=1, progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_sizes_that_the_dtype_moves_are_told() -> None:
    model = in_dtype(make_model(), torch.bfloat16)
    found = probe_noise(model, judge(), sizes=(2**-10, 0.1), seeds=1, progress=False)
    first, last = found.curves[0].points
    assert abs(first.stored / first.size - 1) > 0.1
    assert last.stored == pytest.approx(0.1, rel=0.01)
    assert any("--dtype float32" in sentence for sentence in noise_section(found).sentences)


def test_a_layer_that_takes_no_noise_is_seen() -> None:
    """A part with more in it costs more: noise in the values of a model that counts."""
    model = make_model()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(20)
            block.mlp.down_proj.weight.zero_()
    bench = Judge(random_ids([30] * 8))
    harm = {}
    for part in ("self_attn.o_proj", "mlp.gate_proj"):
        found = probe_noise(model, bench, layers=(part,), sizes=(0.1, 0.5), progress=False)
        harm[part] = [abs(point.value) for point in found.curves[0].points]
    assert harm["mlp.gate_proj"] == [0, 0]
    assert min(harm["self_attn.o_proj"]) > 1e-6


def test_aligned_noise_needs_an_error_of_weights() -> None:
    model = make_model()
    with pytest.raises(UserError, match="aligned"):
        probe_noise(model, judge(), kinds=("aligned",), sizes=SIZES)
    run_of = compress_twin(model, None, Recipe(method="rtn", scheme="W8A8"), QUIET)
    found = probe_noise(model, judge(), run_of, sizes=SIZES, seeds=1, progress=False)
    assert found.actual is None
    assert "No error of the recipe" in noise_section(found).sentences[-1]


def points(losses: list[float], sizes: list[float] | None = None) -> list[Point]:
    sizes = sizes or [0.01 * 2**i for i in range(len(losses))]
    return [Point(s, s, y, 0.9 * y, 1.1 * y, (y, y)) for s, y in zip(sizes, losses, strict=True)]


def test_slopes_and_crossings_by_hand() -> None:
    square = points([5 * (0.01 * 2**i) ** 2 for i in range(6)])
    found = slope_of(square)
    assert found is not None
    assert (found.value, found.points) == (pytest.approx(2), 6)
    assert size_at(square, 5 * 0.03**2) == pytest.approx(0.03)
    assert size_at(square, 1e-9) is None
    assert where_not(square, 1e-9) == "below 0.01"
    assert where_not(square, 1e9) == "above 0.32"
    broken = [*square, Point(0.64, 0.64, math.inf, math.inf, math.inf, ())]
    assert slope_of(broken) == found
    # A loss beyond 1 nat, and one that is not told from 0, fit nothing.
    assert slope_of(points([-1e-3, 0.25, 0.5, 1.5])) == slope_of(points([0.25, 0.5], [0.02, 0.04]))
    assert slope_of(points([0.1, 3.0])) is None
    # From below 0 the loss itself is drawn straight.
    assert size_at(points([-1.0, 1.0], [0.1, 0.4]), 0.0) == pytest.approx(0.2)


def test_findings_lay_the_recipe_on_the_ruler() -> None:
    """Gaussian noise of the size of the error, made the recipe: it lies on its own curve."""
    model, ids = trained()
    run_of = compress_twin(model, None, RTN, QUIET)
    assert run_of.weights is not None
    for place in run_of.weights._places.values():
        drawn = generator_of("plant", place.owners[0][0].name)
        noise = weight_noise(place.dense, 0.1, "gaussian", drawn)
        place.compressed = place.dense + noise
    found = probe_noise(
        model,
        Judge(ids),
        run_of,
        kinds=("gaussian",),
        sizes=(0.05, 0.1, 0.2),
        seeds=4,
        progress=False,
    )
    assert found.actual is not None
    assert found.actual.size == pytest.approx(0.1, rel=1e-5)
    like = found.curves[0].like_recipe
    assert like is not None
    assert like[0] == pytest.approx(0.1, rel=0.4)
    first = noise_findings(found)[0]
    assert "the recipe's weight error of 0.1 costs" in first
    assert f"Gaussian noise of {like[0]:.3g}" in first
    assert np.isfinite(found.actual.scores).all()
