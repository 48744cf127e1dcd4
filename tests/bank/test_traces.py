"""Gradient traces against autograd, alignment against a grid."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from lm_calib_plugin import engine
from lm_calib_plugin.bank import traces
from lm_calib_plugin.bank.traces import align_shares, gradient_traces, squared_norm
from lm_calib_plugin.errors import NumericalError, UnsupportedModelError, UserError
from tests.tiny import make_model, random_ids

LENGTHS = [12, 2, 20]


def opened(name, **changes):
    model = make_model(name, **changes)
    layers, _ = engine.find_layers(engine.find_blocks(model))
    return model, layers


def by_autograd(model, layers, sequences):
    """Differentiate the mean loss with respect to the stored weights."""
    total = torch.zeros(len(layers), dtype=torch.float64)
    parameters = [layer.parameter for layer in layers]
    for ids in sequences:
        loss = functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:])
        found = torch.autograd.grad(loss, parameters)
        total += torch.stack([g.double().square().sum() for g in found])
    return total / len(sequences)


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "opt", "gpt2", "gemma2", "phi3", "falcon", "bloom", "gpt_neox"]
)
def test_traces_are_the_squared_norms_of_the_weight_gradients(name):
    model, layers = opened(name)
    sequences = random_ids(LENGTHS)
    found = gradient_traces(model, layers, sequences)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, by_autograd(model, layers, sequences), rtol=1e-4, atol=0)
    assert (found > 0).all()


def test_parameters_need_no_gradient():
    model, layers = opened("llama")
    sequences = random_ids(LENGTHS)
    expected = by_autograd(model, layers, sequences)
    model.requires_grad_(False)
    with torch.no_grad():
        found = gradient_traces(model, layers, sequences)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_half_precision_gradients_do_not_vanish():
    model, layers = opened("llama")
    sequences = random_ids([30, 30])
    expected = by_autograd(model, layers, sequences)
    found = gradient_traces(model.to(torch.bfloat16), layers, sequences)
    torch.testing.assert_close(found, expected, rtol=0.15, atol=0)


def test_the_model_is_left_as_found():
    model, layers = opened("opt")
    model.train()
    model.model.decoder.layers[1].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    kept = next(p for p in model.parameters() if p.requires_grad)
    kept.grad = torch.ones_like(kept)
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()

    gradient_traces(model, layers, random_ids(LENGTHS))

    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(p.grad is None for p in model.parameters() if p is not kept)
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_the_model_is_left_as_found_after_an_error():
    model, layers = opened("llama")
    with torch.no_grad():
        layers[5].parameter.fill_(float("inf"))
    with pytest.raises(NumericalError, match="gradient traces"):
        gradient_traces(model, layers, random_ids(LENGTHS))
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_traces_repeat_to_the_bit_and_do_not_depend_on_other_sequences():
    model, layers = opened("llama")
    sequences = random_ids(LENGTHS)
    whole = gradient_traces(model, layers, sequences)
    assert torch.equal(whole, gradient_traces(model, layers, sequences))
    single = torch.stack([gradient_traces(model, layers, [ids]) for ids in sequences])
    torch.testing.assert_close(single.mean(0), whole, rtol=1e-12, atol=0)
    part = gradient_traces(model, [layers[9], layers[2]], sequences)
    assert torch.equal(part, whole[[9, 2]])


def test_a_module_used_twice_has_one_gradient():
    model, layers = opened("llama")
    blocks = engine.find_blocks(model).modules
    blocks[1].mlp = blocks[0].mlp
    used = [layer for layer in layers if layer.block == 0 and ".mlp." in layer.name]
    sequences = random_ids(LENGTHS)
    found = gradient_traces(model, used, sequences)
    torch.testing.assert_close(found, by_autograd(model, used, sequences), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("tokens", "out", "width"), [(5, 40, 30), (50, 8, 6), (1, 3, 4)])
@pytest.mark.parametrize("elements", [1 << 24, 16])
def test_both_ways_to_the_norm(tokens, out, width, elements, monkeypatch):
    monkeypatch.setattr(traces, "_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(tokens, out, generator=generator)
    x = torch.randn(tokens, width, generator=generator)
    expected = sum(
        sum(g[t, o].item() * x[t, i].item() for t in range(tokens)) ** 2
        for o in range(out)
        for i in range(width)
    )
    assert squared_norm(g, x) == pytest.approx(expected, rel=1e-5)


def test_what_has_no_trace_is_refused():
    model, layers = opened("mixtral")
    with pytest.raises(UnsupportedModelError, match=r"ignore=\*experts\*"):
        gradient_traces(model, layers, random_ids([5]))
    model, layers = opened("llama")
    head = dataclasses.replace(layers[0], block=-1, name="lm_head")
    with pytest.raises(UnsupportedModelError, match="outside the decoder blocks"):
        gradient_traces(model, [head], random_ids([5]))
    for given, words in (([], "none given"), (random_ids([5, 1]), "sequence 1")):
        with pytest.raises(UserError, match=words):
            gradient_traces(model, layers, given)


def distance(shares, sources, target):
    mixed = np.asarray(shares) @ sources
    return np.sum((mixed / mixed.sum() - target / target.sum()) ** 2)


def grid(count, steps):
    for cut in itertools.product(range(steps + 1), repeat=count - 1):
        if sum(cut) <= steps:
            yield np.array([*cut, steps - sum(cut)]) / steps


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "steps"), [(2, 2000), (3, 120)])
def test_alignment_is_at_least_as_good_as_a_fine_grid(count, steps, seed, floor):
    rng = np.random.default_rng(seed)
    # Sources of very different loudness, as real text has it.
    sources = rng.uniform(0, 1, (count, 6)) * 10 ** rng.uniform(-3, 3, (count, 1))
    target = rng.uniform(0, 1, 6)
    found = align_shares(torch.from_numpy(sources), torch.from_numpy(target), floor).numpy()
    assert found.sum() == pytest.approx(1)
    assert found.min() >= floor - 1e-12
    best = min(
        distance(floor + (1 - count * floor) * shares, sources, target)
        for shares in grid(count, steps)
    )
    assert distance(found, sources, target) <= best + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_a_mix_is_found_again(seed):
    rng = np.random.default_rng(seed)
    sources = rng.uniform(0, 1, (4, 9)) * [[0.1], [1], [3], [10]]
    shares = rng.dirichlet([1] * 4)
    found = align_shares(torch.from_numpy(sources), torch.from_numpy(7 * shares @ sources))
    np.testing.assert_allclose(found, shares, atol=1e-6)


def test_nearly_equal_profiles_are_told_apart():
    base = np.linspace(1, 2, 8)
    sources = base + 1e-6 * np.random.default_rng(0).normal(size=(2, 8))
    target = 0.3 * sources[0] + 0.7 * sources[1]
    found = align_shares(torch.from_numpy(sources), torch.from_numpy(target))
    np.testing.assert_allclose(found, [0.3, 0.7], atol=1e-3)


def test_equal_sources_share_equally_in_any_order():
    rng = np.random.default_rng(3)
    a, b, target = rng.uniform(0, 1, (3, 6))
    found = align_shares(torch.tensor(np.stack([a, b, a])), torch.tensor(0.4 * a + 0.6 * b))
    np.testing.assert_allclose(found, [0.2, 0.6, 0.2], atol=1e-6)
    order = [2, 0, 1]
    sources = torch.tensor(np.stack([a, b, target]))
    wanted = torch.tensor(rng.uniform(0, 1, 6))
    forth, back = align_shares(sources, wanted), align_shares(sources[order], wanted)
    np.testing.assert_allclose(back, forth[order], atol=1e-9)
    same = align_shares(torch.ones(3, 4), torch.ones(4))
    np.testing.assert_allclose(same, 1 / 3)


def test_the_target_among_the_sources_takes_all_but_the_floor():
    sources = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 1.0]])
    np.testing.assert_allclose(align_shares(sources, 5 * sources[0]), [1, 0], atol=1e-6)
    np.testing.assert_allclose(align_shares(sources, sources[0], 0.2), [0.8, 0.2], atol=1e-6)


@pytest.mark.parametrize(
    ("sources", "target", "floor", "words"),
    [
        (torch.ones(2, 3), torch.ones(4), 0.0, "shapes"),
        (torch.ones(2, 3), -torch.ones(3), 0.0, "negative"),
        (torch.zeros(2, 3), torch.ones(3), 0.0, "all 0"),
        (torch.full((2, 3), torch.nan), torch.ones(3), 0.0, "not finite"),
        (torch.ones(2, 3), torch.ones(3), 0.6, "0 to 1/2"),
    ],
)
def test_bad_traces_are_refused(sources, target, floor, words):
    with pytest.raises(UserError, match=words):
        align_shares(sources, target, floor)
