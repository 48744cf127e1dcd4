"""The one pass over the pool, against the model asked sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model, word_tokenizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lm_calib_plugin.calibration.selectors import features as features_module
from lm_calib_plugin.calibration.selectors.features import NEEDS, Features
from lm_calib_plugin.calibration.selectors.gradients import RANK, SKETCH, adapter, sketch
from lm_calib_plugin.calibration.selectors.probes import decoder_blocks
from lm_calib_plugin.errors import CalibError, NumericalError, UnsupportedModelError

LENGTHS = [7, 3, 9, 1, 5, 9, 2]
EVERYTHING = NEEDS - {"words"}


def gpt2():
    config = GPT2Config(
        vocab_size=63,
        n_embd=16,
        n_layer=3,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return GPT2LMHeadModel(config)


def pool(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 63, (n,), generator=generator) for n in lengths]


@pytest.fixture(params=[tiny_model, gpt2], ids=["llama", "gpt2"])
def any_model(request):
    made = request.param()
    made.train()
    for parameter in made.parameters():  # gradients of a random model are near zero otherwise
        parameter.data *= 4
    return made


def test_nll_is_the_loss_of_each_sequence_alone(any_model):
    sequences = pool()
    found = Features(sequences, frozenset({"nll"}), model=any_model, batch_size=3).nll
    any_model.eval()
    for value, ids in zip(found.tolist(), sequences, strict=True):
        if len(ids) == 1:
            assert value == float("inf")
            continue
        loss = any_model(input_ids=ids[None], labels=ids[None]).loss.detach()
        assert value == pytest.approx(float(loss), rel=1e-4)


def test_means_are_those_of_the_hidden_states_without_the_first(any_model):
    sequences = pool()
    found = Features(sequences, frozenset({"means"}), model=any_model, batch_size=4).means
    any_model.eval()
    outputs: dict[int, torch.Tensor] = {}
    blocks = decoder_blocks(any_model, None)
    for number, block in enumerate(blocks):
        block.register_forward_hook(
            lambda m, i, o, n=number: outputs.update({n: o[0] if isinstance(o, tuple) else o})
        )
    assert len(found) == len(blocks)
    for place, ids in enumerate(sequences):
        with torch.no_grad():
            any_model(input_ids=ids[None])
        for number, mean in enumerate(found):
            hidden = outputs[number].reshape(len(ids), -1)
            expected = (hidden[1:] if len(ids) > 1 else hidden).mean(0)
            assert torch.allclose(mean[place], expected, atol=1e-4, rtol=1e-4)


def test_maxima_are_those_of_every_linear_input(any_model):
    sequences = pool()
    found = Features(sequences, frozenset({"maxima"}), model=any_model, batch_size=4).maxima
    any_model.eval()
    blocks = decoder_blocks(any_model, None)
    linear = {
        n: m
        for n, m in blocks.named_modules()
        if getattr(m, "weight", None) is not None and m.weight.dim() == 2
    }
    assert sorted(n for one in found for n in one.layers) == sorted(linear)
    if "0.self_attn.q_proj" in linear:
        assert ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj") in [
            one.layers for one in found
        ]
    seen: dict[str, torch.Tensor] = {}
    for name, module in linear.items():
        module.register_forward_pre_hook(lambda m, i, n=name: seen.update({n: i[0]}))
    for place, ids in enumerate(sequences):
        with torch.no_grad():
            any_model(input_ids=ids[None])
        for one in found:
            for name in one.layers:
                x = seen[name].reshape(len(ids), -1)
                expected = (x[1:] if len(ids) > 1 else x).abs().amax(0)
                assert torch.allclose(one.values[place], expected, atol=1e-4, rtol=1e-4)
    for one in found:
        norms = torch.zeros(one.values.shape[1], dtype=torch.float64)
        for name in one.layers:
            weight = linear[name].weight
            columns = weight if isinstance(linear[name], nn.Linear) else weight.t()
            norms += columns.detach().double().square().sum(0)
        assert torch.allclose(one.energy, norms, rtol=1e-5)


class Adapted(nn.Module):
    """A linear layer with an adapter whose second factor is zero and has a gradient."""

    def __init__(self, layer, first):
        super().__init__()
        self.layer, self.first = layer, first
        out = layer.weight.shape[0] if isinstance(layer, nn.Linear) else layer.weight.shape[1]
        self.second = nn.Parameter(torch.zeros(out, RANK))

    def forward(self, x):
        return self.layer(x) + (x @ self.first.t()) @ self.second.t()


def test_gradients_are_those_of_a_real_adapter(any_model):
    sequences = pool()
    found = Features(sequences, frozenset({"gradients"}), model=any_model, batch_size=4).gradients
    assert found.shape == (len(sequences), SKETCH)
    any_model.eval()
    blocks = decoder_blocks(any_model, None)
    adapted: dict[str, Adapted] = {}
    for number in range(len(blocks) - 2, len(blocks)):
        for name, module in list(blocks[number].named_modules()):
            if getattr(module, "weight", None) is not None and module.weight.dim() == 2:
                width = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
                made = Adapted(module, adapter(f"{number}.{name}", width))
                parent, _, last = name.rpartition(".")
                setattr(blocks[number].get_submodule(parent), last, made)
                adapted[f"{number}.{name}"] = made
    assert len(adapted) == (14 if len(blocks) == 2 else 8)
    for place, ids in enumerate(sequences):
        if len(ids) == 1:
            assert not found[place].any()
            continue
        any_model.zero_grad()
        any_model(input_ids=ids[None], labels=ids[None]).loss.backward()
        expected = sum(sketch(n, a.second.grad[None])[0] for n, a in adapted.items())
        assert torch.allclose(found[place].float(), expected, atol=1e-5, rtol=1e-3)
        assert float(expected.norm()) > 1e-2


def test_sketch_keeps_inner_products():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 300, RANK, generator=generator)
    pairs = [(sketch(f"layer{i}", a)[0], sketch(f"layer{i}", b)[0]) for i in range(60)]
    found = torch.tensor([float(x @ y) for x, y in pairs])
    # Variance of one sketch: (|a|^2 |b|^2 + (a b)^2) / places at most.
    spread = float(a.norm() * b.norm()) * (2 / SKETCH) ** 0.5
    assert abs(float(found.mean()) - float((a * b).sum())) < 4 * spread / 60**0.5
    assert float(found.std()) < 1.5 * spread
    x = sketch("layer0", a)[0]
    assert torch.allclose(sketch("layer0", 2 * a + b)[0], 2 * x + pairs[0][1], atol=1e-4)


def test_one_pass_for_everything_and_no_matter_how_it_is_cut(any_model):
    sequences = pool()
    together = Features(sequences, EVERYTHING, model=any_model, batch_size=7)
    calls = []
    any_model.register_forward_hook(lambda *a: calls.append(1))
    small = Features(sequences, EVERYTHING, model=any_model, batch_size=2)
    assert calls == []  # nothing is computed before it is asked
    _ = small.nll, small.means, small.maxima, small.gradients, small.projected()
    assert len(calls) == 4
    assert small.cost["batch_size"] == 2
    assert small.cost["tokens"] == sum(LENGTHS)
    assert torch.allclose(together.nll, small.nll, rtol=1e-4)
    assert torch.allclose(together.gradients, small.gradients, atol=1e-5, rtol=1e-3)
    for a, b in zip(together.means, small.means, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)
    for x, y in zip(together.maxima, small.maxima, strict=True):
        assert torch.allclose(x.values, y.values, atol=1e-4, rtol=1e-4)
    for name in EVERYTHING:
        alone = Features(sequences, frozenset({name}), model=any_model, batch_size=7)
        if name == "nll":
            assert torch.equal(alone.nll, together.nll)


def test_projection_is_one_fixed_matrix(model):
    found = Features(pool(), frozenset({"means"}), model=model)
    unit = [mean.double() / mean.double().norm(dim=1, keepdim=True) for mean in found.means]
    whole = torch.cat(unit, 1)
    vectors = found.projected(4000)
    # 4,000 dimensions keep squared lengths within a few percent.
    assert torch.allclose(vectors.square().sum(1), whole.square().sum(1), rtol=0.15)
    assert torch.allclose(vectors @ vectors.T, whole @ whole.T, atol=0.15)
    again = Features(pool()[::-1], frozenset({"means"}), model=model).projected(4000)
    assert torch.allclose(again.flip(0), vectors, atol=1e-5)


def test_everything_is_left_as_found(any_model):
    any_model.get_output_embeddings().weight.requires_grad_(False)
    flags = [(p.requires_grad, p.grad) for p in any_model.parameters()]
    training = [m.training for m in any_model.modules()]
    weights = {n: t.clone() for n, t in any_model.state_dict().items()}
    random_state = torch.get_rng_state()

    def state():
        assert [(p.requires_grad, p.grad) for p in any_model.parameters()] == flags
        assert [m.training for m in any_model.modules()] == training
        assert all(torch.equal(t, weights[n]) for n, t in any_model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random_state)
        assert torch.is_grad_enabled()
        for module in any_model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks

    assert Features(pool(), EVERYTHING, model=any_model).nll.shape == (7,)
    state()
    broken = [torch.tensor([1, 2]), torch.tensor([1, 99])]  # an id without a row
    with pytest.raises(IndexError):
        _ = Features(broken, EVERYTHING, model=any_model).nll
    state()


def test_out_of_memory_halves_the_batch_with_the_same_result(model, monkeypatch):
    expected = Features(pool(), EVERYTHING, model=model, batch_size=2)
    _ = expected.gradients
    losses = features_module.sequence_losses

    def tight(logits, batch):
        if len(batch.ids) > 2:  # the probes have heard the batch by now
            raise torch.OutOfMemoryError("on purpose")
        return losses(logits, batch)

    monkeypatch.setattr(features_module, "sequence_losses", tight)
    found = Features(pool(), EVERYTHING, model=model, batch_size=5)
    assert torch.equal(found.nll, expected.nll)
    assert found.cost["batch_size"] == 2
    assert torch.equal(found.gradients, expected.gradients)
    assert all(torch.equal(a, b) for a, b in zip(found.means, expected.means, strict=True))
    assert [m.layers for m in found.maxima] == [m.layers for m in expected.maxima]
    assert all(
        torch.equal(a.values, b.values) for a, b in zip(found.maxima, expected.maxima, strict=True)
    )

    def never(logits, batch):
        raise torch.OutOfMemoryError("on purpose")

    monkeypatch.setattr(features_module, "sequence_losses", never)
    with pytest.raises(CalibError, match="one sequence of the pool at a time; lower seqlen"):
        _ = Features(pool(), frozenset({"nll"}), model=model).nll


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_not_a_number_is_found_and_named(model, name):
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="features of the pool"):
        _ = getattr(Features(pool(), frozenset({name}), model=model), name)


def test_what_is_not_declared_is_not_given(model):
    found = Features(pool(), frozenset({"nll"}), model=model)
    with pytest.raises(LookupError, match="`means`"):
        _ = found.means
    with pytest.raises(LookupError, match="takes_target"):
        _ = found.target


def test_words_need_no_model():
    tokenizer = word_tokenizer()
    ids = tokenizer("w1 w2 w1 w30", add_special_tokens=False)["input_ids"]
    found = Features([torch.tensor(ids)], frozenset({"words"}), tokenizer=tokenizer)
    assert found.words == [frozenset({"w1", "w2", "w30"})]


def test_blocks_are_found_or_named(any_model):
    path = "transformer.h" if hasattr(any_model, "transformer") else "model.layers"
    assert decoder_blocks(any_model, path) is decoder_blocks(any_model, None)
    with pytest.raises(UnsupportedModelError, match=f"lists seen: {path}"):
        decoder_blocks(any_model, "no.such.list")
