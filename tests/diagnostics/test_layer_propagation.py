"""Errors by depth and by layer, against direct computation in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lm_calib_plugin.diagnostics.layers import propagation
from lm_calib_plugin.diagnostics.layers.depths import Depth, Propagation
from lm_calib_plugin.diagnostics.layers.figures import by_depth
from lm_calib_plugin.diagnostics.layers.findings import _travel
from lm_calib_plugin.diagnostics.layers.measuring import InputSeen, Rounded
from lm_calib_plugin.diagnostics.layers.propagation import follow
from lm_calib_plugin.diagnostics.tokens import TokenDivergence
from lm_calib_plugin.engine import find_blocks
from lm_calib_plugin.errors import CalibError, NumericalError
from lm_calib_plugin.quantization.activations import ActivationSpec
from tests.tiny import in_dtype, make_model, random_ids

UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.2.mlp.down_proj"


def noisy(model: Any, size: float = 0.1, seed: int = 3) -> Any:
    """A copy with noise on every weight of the blocks."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if ".layers." in name and p.dim() == 2:
                p += size * p.std() * torch.randn(p.shape, generator=generator).to(p.dtype)
    return other


def behind(model: Any, ids: torch.Tensor, given: list[torch.Tensor] | None = None) -> Any:
    """Hidden states in front of, and behind, every block; blocks may be given their inputs."""
    outputs, inputs, hooks = [], [], []
    for index, block in enumerate(find_blocks(model).modules):

        def before(_m: Any, args: Any, kwargs: Any, index: int = index) -> Any:
            if given is not None:
                args = (given[index], *args[1:])
            inputs.append(args[0])
            return args, kwargs

        hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(block.register_forward_hook(lambda _m, _a, out: outputs.append(out)))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return inputs, [o if isinstance(o, torch.Tensor) else o[0] for o in outputs], logits


def square(x: torch.Tensor) -> float:
    return float(x.double().square().sum())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "qwen3_moe"])
def test_curves_equal_direct_computation(name: str) -> None:
    dense = make_model(name)
    other = noisy(dense)
    ids = torch.stack(random_ids([20, 20]))
    inputs, ours, logits = behind(dense, ids)
    _, forced, _ = behind(other, ids, inputs)
    _, free, theirs = behind(other, ids)
    found = follow(dense, other, list(ids), progress=False).propagation
    assert found is not None
    for index in range(3):
        energy = square(ours[index])
        assert found.curve("local")[index] == pytest.approx(
            square(forced[index] - ours[index]) / energy, rel=1e-4
        )
        assert found.curve("free")[index] == pytest.approx(
            square(free[index] - ours[index]) / energy, rel=1e-4
        )
        rest = slice(1, None)
        assert found.curve("free", rest=True)[index] == pytest.approx(
            square((free[index] - ours[index])[:, rest]) / square(ours[index][:, rest]), rel=1e-4
        )
    # The first block receives the same in both ways.
    assert found.curve("free")[0] == found.curve("local")[0] > 0
    own = [square(forced[i] - ours[i]) for i in range(3)]
    assert found.amplification() == pytest.approx(square(free[2] - ours[2]) / sum(own), rel=1e-4)
    assert found.added()[2] == pytest.approx(sum(own) / square(ours[2]), rel=1e-4)
    around = [x.double() - x.double().mean(-1, keepdim=True) for x in (logits, theirs)]
    assert found.logit_error() == pytest.approx(
        square(around[1] - around[0]) / square(around[0]), rel=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_beside_its_copy_differs_by_exactly_nothing(dtype: torch.dtype) -> None:
    dense = in_dtype(make_model(), dtype)
    result = follow(dense, copy.deepcopy(dense), random_ids([17, 9]), [UP], progress=False)
    found = result.propagation
    assert found is not None
    assert found.curve("local") == found.curve("free") == [0.0] * 3
    assert found.logit_error() == 0
    assert found.amplification() is None
    assert float(TokenDivergence.joined(found.tokens).js.abs().max()) == 0
    assert result.layers[UP].error == 0


def test_layers_equal_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of the weights, of rounded inputs, of both; in one chunk, or in many."""
    dense, sequences = make_model(), random_ids([11, 24, 5, 24])
    other = noisy(dense)
    static = Rounded(ActivationSpec(bits=4, dynamic=False), limit=1.0)
    rounded = {UP: Rounded(ActivationSpec(bits=4)), DOWN: static}
    taken: dict[str, list[torch.Tensor]] = {UP: [], DOWN: []}
    hooks = [
        dense.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: rows(taken[name], args)
        )
        for name in taken
    ]
    with torch.no_grad():
        for one in sequences:
            dense(one[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    results = [follow(dense, other, sequences, list(taken), rounded, progress=False)]
    monkeypatch.setattr(propagation, "token_budget", lambda _device, _length: 1)
    results.append(follow(dense, other, sequences, list(taken), rounded, progress=False))
    for result in results:
        for name, parts in taken.items():
            x = torch.cat(parts).double()
            w, v = (m.get_submodule(name).weight.detach().double() for m in (dense, other))
            q = rounded[name](x.float()).double()
            measured, energy = result.layers[name], square(x @ w.T)
            assert measured.error == pytest.approx(square(x @ (v - w).T) / energy, rel=1e-4)
            assert measured.of_inputs == pytest.approx(square((q - x) @ w.T) / energy, rel=1e-3)
            assert measured.total == pytest.approx(square(q @ v.T - x @ w.T) / energy, rel=1e-3)
            seen = measured.seen
            assert seen.tokens == 64
            torch.testing.assert_close(seen.amax.double(), x.abs().amax(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(seen.square, x.square().sum(0), rtol=1e-4, atol=1e-9)
            beyond = int((x.abs() > 1).sum()) if name == DOWN else 0
            assert abs(measured.beyond - beyond) <= 1
    first, second = (r.propagation for r in results)
    assert first is not None
    assert second is not None
    assert first.curve("free") == pytest.approx(second.curve("free"), rel=1e-5)
    for one in (first, second):
        assert len(TokenDivergence.joined(one.tokens)) == 60


def rows(into: list[torch.Tensor], args: Any) -> None:
    into.append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())


def test_what_was_seen_adds_up() -> None:
    x = torch.randn(30, 5)
    x[:, 2] = 0
    whole, parts = InputSeen.of(x), InputSeen.of(x[:7])
    parts.add(InputSeen.of(x[7:7]))
    parts.add(InputSeen.of(x[7:]))
    assert torch.equal(whole.amax, parts.amax)
    torch.testing.assert_close(whole.square, parts.square)
    assert whole.active.tolist() == parts.active.tolist() == [30, 30, 0, 30, 30]
    assert parts.tokens == 30


def test_experts_are_measured_on_their_own_tokens() -> None:
    dense = make_model("qwen3_moe")
    other = noisy(dense)
    names = [f"model.layers.1.mlp.experts.{e}.gate_up_proj" for e in range(4)]
    with torch.no_grad():
        for block in other.model.layers:
            block.mlp.experts.gate_up_proj.mul_(1.1)
    found = follow(dense, other, random_ids([20]), names, progress=False).layers
    assert sum(found[name].seen.tokens for name in names) == 40  # two experts a token
    for name in names:
        if found[name].seen.tokens:
            assert found[name].error == pytest.approx(0.01, rel=1e-3)


def test_memory_that_runs_out_halves_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, ids = make_model(), random_ids([12] * 5)
    other = noisy(dense)
    whole = follow(dense, other, ids, [UP], progress=False)
    real = propagation._Pair.through

    def short(limit: int) -> Callable[..., Any]:
        def through(self: Any, chunk: Any, *rest: Any) -> Any:
            if chunk.rows > limit:
                raise torch.OutOfMemoryError("too large")
            return real(self, chunk, *rest)

        return through

    monkeypatch.setattr(propagation._Pair, "through", short(1))
    found = follow(dense, other, ids, [UP], progress=False)
    assert whole.propagation is not None
    assert found.propagation is not None
    assert found.propagation.curve("free") == pytest.approx(whole.propagation.curve("free"))
    assert found.layers[UP].error == pytest.approx(whole.layers[UP].error)
    monkeypatch.setattr(propagation._Pair, "through", short(0))
    with pytest.raises(CalibError, match="--text-length"):
        follow(dense, other, ids, progress=False)


def test_models_of_other_depths_are_compared_at_the_end() -> None:
    dense = make_model()
    other = copy.deepcopy(dense)
    del other.model.layers[1]
    other.config.num_hidden_layers = 2
    for index, block in enumerate(other.model.layers):
        block.self_attn.layer_idx = index
    ids = random_ids([15, 8])
    found = follow(dense, other, ids, [UP], progress=False)
    assert found.layers == {}
    trace = found.propagation
    assert trace is not None
    assert not trace.aligned
    assert trace.amplification() is None
    ours = [behind(dense, one[None])[1][-1] for one in ids]
    theirs = [behind(other, one[None])[1][-1] for one in ids]
    error = sum(square(b - a) for a, b in zip(ours, theirs, strict=True))
    expected = error / sum(map(square, ours))
    assert trace.curve("free") == pytest.approx([expected], rel=1e-4)


def test_first_tokens_that_hide_an_error_are_told() -> None:
    """Block 1 has a first token of a thousand times the energy, which hides a third."""

    def both(every: float, rest: float) -> torch.Tensor:
        return torch.tensor([every, rest], dtype=torch.float64)

    plain = Depth(both(10, 9), both(1, 0.9), both(1, 0.9))
    massive = Depth(both(3000, 3), both(1, 0.9), both(1.1, 1.0))
    found = Propagation([plain, massive])
    assert found.first_tokens() == (1, pytest.approx((1.0 / 3) / (1.1 / 3000)))
    assert any("behind block 1 the error without them is 0.333" in s for s in _travel(found))
    figure = by_depth(found)
    assert figure is not None
    assert "free, without first tokens: 0.333" in figure.description
    calm = Propagation([plain, plain])
    assert not any("First tokens" in s for s in _travel(calm))
    assert Propagation([Depth()]).first_tokens() is None


def test_models_are_left_as_found_and_what_is_no_number_is_named() -> None:
    dense = make_model()
    other = noisy(dense)
    dense.train()
    state = torch.get_rng_state()
    follow(dense, other, random_ids([9]), [UP], progress=False)
    assert dense.training
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"model\.layers\.1, propagation"):
        follow(dense, other, random_ids([9]), progress=False)
