"""A block as a function of its weights, against plain passes of whole models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_calib_plugin import engine, guard
from lm_calib_plugin.engine import tuning
from lm_calib_plugin.engine.batches import Chunk, make_chunks
from lm_calib_plugin.engine.layers import TargetLayer, find_layers
from lm_calib_plugin.engine.passes import BlockPass
from lm_calib_plugin.engine.tuning import BlockTuning
from lm_calib_plugin.quantization.grids import IntegerGrid
from lm_calib_plugin.quantization.rounding.autoround import AutoRound
from tests.tiny import make_model, random_ids

NAMES = ["llama", "qwen3", "gpt2", "gemma3", "bloom", "gpt_neox"]
PADDED, EVEN = [16, 9, 4, 16, 12, 7, 16], [12] * 7
INDEX = 1


def made(
    name: str, lengths: list[int], size: int = 3, heldout: tuple[int, ...] = (2, 5), **options: Any
) -> tuple[nn.Module, BlockTuning, list[TargetLayer], list[Chunk]]:
    """A model, its block number 1 with dense inputs, and the layers of that block."""
    model = make_model(name)
    blocks = engine.find_blocks(model)
    chunks = make_chunks(random_ids(lengths), heldout, size, 0, **options)
    steps = BlockPass(model, blocks, chunks, torch.device("cpu"))
    with guard.left_as_found(model):
        steps.capture()
        steps.propagate(0)
        layers = [x for x in find_layers(blocks)[0] if x.block == INDEX]
        problem = BlockTuning(blocks.modules[INDEX], layers, chunks, INDEX)
    return model, problem, layers, chunks


def moved(problem: BlockTuning, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: w + 0.3 * w.std() * torch.randn(w.shape, generator=generator)
        for name, w in problem.weights.items()
    }


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy of the model with these weights of its block in place."""
    changed = copy.deepcopy(model)
    for layer in find_layers(engine.find_blocks(changed))[0]:
        if layer.name in weights:
            layer.write(weights[layer.name])
    return changed


def outputs(model: nn.Module, sequences: list[Tensor]) -> list[Tensor]:
    """What block 1 returns for every sequence alone, by a hook in a plain pass."""
    found: list[Tensor] = []

    def take(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append((output if isinstance(output, Tensor) else output[0])[0])

    hook = engine.find_blocks(model).modules[INDEX].register_forward_hook(take)
    for ids in sequences:
        model(input_ids=ids[None], use_cache=False)
    hook.remove()
    return found


def order(chunks: list[Chunk], heldout: bool) -> list[int]:
    return [n for chunk in chunks if chunk.heldout == heldout for n in chunk.numbers]


@pytest.mark.parametrize("lengths", [PADDED, EVEN], ids=["pads", "even"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_is_that_of_plain_passes(name: str, lengths: list[int]) -> None:
    model, problem, _, chunks = made(name, lengths)
    weights = moved(problem)
    sequences = random_ids(lengths)
    with torch.no_grad():
        dense = outputs(model, sequences)
        changed = outputs(with_weights(model, weights), sequences)
        errors = [(a.double() - b.double()).square() for a, b in zip(changed, dense, strict=True)]
        for heldout in (False, True):
            numbers = order(chunks, heldout)
            count = problem.heldout if heldout else problem.sequences
            whole = torch.cat([errors[n] for n in numbers]).mean()
            found = problem.loss(weights, range(count), heldout)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), whole, rtol=1e-3, atol=0)
            if count == len(numbers):
                for picked in ([0], [len(numbers) - 1, 0]):
                    part = torch.cat([errors[numbers[i]] for i in picked]).mean()
                    found = problem.loss(weights, picked, heldout).double()
                    torch.testing.assert_close(found, part, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3", "gpt_neox"])
def test_a_sequence_is_a_row_of_a_chunk(name: str) -> None:
    for lengths in (PADDED, EVEN):
        _, problem, _, _ = made(name, lengths)
        assert (problem.sequences, problem.heldout) == (5, 2)


def test_chunks_that_cannot_be_cut_count_as_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    _, rows, _, _ = made("llama", PADDED)

    def wrong(call: Any, rows: list[int], batch: int) -> Any:
        raise RuntimeError("The size of tensor a must match the size of tensor b")

    monkeypatch.setattr(tuning, "_cut", wrong)
    _, whole, _, chunks = made("llama", PADDED)
    assert (whole.sequences, whole.heldout) == (2, 1)
    weights = moved(whole)
    for heldout, count in ((False, 5), (True, 2)):
        every = whole.loss(weights, range(len(order(chunks, heldout)) // 2), heldout)
        torch.testing.assert_close(every, rows.loss(weights, range(count), heldout))


def test_a_cut_that_changes_the_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = tuning._cut

    def first_rows(call: Any, rows: list[int], batch: int) -> Any:
        return cut(call, [0] * len(rows), batch)  # the mask of another sequence

    monkeypatch.setattr(tuning, "_cut", first_rows)
    # The first row is the shorter one: its mask hides tokens of the last.
    _, problem, _, _ = made("llama", [4, 16, 5, 16], size=2, heldout=())
    assert problem.sequences == 2


@pytest.mark.parametrize("lengths", [PADDED, EVEN], ids=["pads", "even"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral", "qwen2_moe"])
def test_gradients_are_those_of_a_plain_pass(name: str, lengths: list[int]) -> None:
    model, problem, _, _ = made(name, lengths, heldout=())
    weights = {k: w.requires_grad_() for k, w in moved(problem).items()}
    slopes = torch.autograd.grad(
        problem.loss(weights, range(problem.sequences)), [*weights.values()]
    )
    changed = with_weights(model, {k: w.detach() for k, w in weights.items()})
    sequences = random_ids(lengths)
    with torch.no_grad():
        dense = torch.cat(outputs(model, sequences))
    (torch.cat(outputs(changed, sequences)) - dense).square().mean().backward()
    by_name = {layer.name: layer for layer in find_layers(engine.find_blocks(changed))[0]}
    for (layer_name, weight), slope in zip(weights.items(), slopes, strict=True):
        layer = by_name[layer_name]
        assert layer.parameter.grad is not None
        stored = layer.parameter.grad
        stored = stored if layer.expert is None else stored[layer.expert]
        expected = stored.t() if layer.transposed else stored
        assert slope.shape == weight.shape
        torch.testing.assert_close(
            slope, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_dense_weights_have_no_error_and_the_model_is_left_alone(name: str) -> None:
    model, problem, layers, _ = made(name, PADDED)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    zero = problem.loss(problem.weights, range(problem.sequences))
    assert float(zero) < 1e-10
    weights = {k: w.requires_grad_() for k, w in moved(problem).items()}
    problem.loss(weights, [0]).backward()
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for layer in layers:
        assert torch.equal(problem.weights[layer.name], layer.read())


def test_sequences_count_by_their_weights_and_first_tokens_may_not() -> None:
    counts = [1.0, 3.0, 0.5, 2.0, 1.0, 1.0, 4.0]
    model, problem, _, chunks = made("llama", PADDED, weights=counts, skip_first=True)
    weights, sequences = moved(problem), random_ids(PADDED)
    with torch.no_grad():
        dense, changed = outputs(model, sequences), outputs(with_weights(model, weights), sequences)
        total = count = 0.0
        for n in order(chunks, False):
            errors = (changed[n] - dense[n]).double().square().mean(dim=1)[1:]
            total += counts[n] * float(errors.sum())
            count += counts[n] * len(errors)
        found = float(problem.loss(weights, range(5)))
    assert found == pytest.approx(total / count, rel=1e-3)


def test_some_layers_may_stay_out_and_foreign_ones_are_refused() -> None:
    model, problem, layers, chunks = made("mixtral", EVEN)
    block = engine.find_blocks(model).modules[INDEX]
    some = [layers[0], layers[-1]]
    part = BlockTuning(block, some, chunks, INDEX)
    weights = moved(problem)
    mixed = problem.weights | {x.name: weights[x.name] for x in some}
    torch.testing.assert_close(
        part.loss({x.name: weights[x.name] for x in some}, [0, 1]), problem.loss(mixed, [0, 1])
    )
    foreign = [x for x in find_layers(engine.find_blocks(model))[0] if x.block == 0]
    with pytest.raises(ValueError, match="not in block 1"):
        BlockTuning(block, foreign, chunks, INDEX)


def test_other_targets_may_be_given() -> None:
    model, problem, layers, chunks = made("llama", PADDED)
    block = engine.find_blocks(model).modules[INDEX]
    shifted = [target + 2.0 for target in problem.targets]
    other = BlockTuning(block, layers, chunks, INDEX, shifted)
    assert float(other.loss(problem.weights, [0, 3])) == pytest.approx(4.0, rel=1e-4)
    assert other.sequences == problem.sequences


def test_pads_that_are_no_numbers_do_no_harm() -> None:
    _, problem, _, chunks = made("llama", [16, 9], size=2, heldout=())
    before = problem.loss(moved(problem), [0, 1])
    assert chunks[0].mask is not None
    problem.targets[0][chunks[0].mask == 0] = float("nan")
    weights = {k: w.requires_grad_() for k, w in moved(problem).items()}
    loss = problem.loss(weights, [0, 1])
    torch.testing.assert_close(loss.detach(), before.detach())
    slopes = torch.autograd.grad(loss, [*weights.values()])
    assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_autoround_lowers_the_error_of_a_real_block(name: str, dtype: torch.dtype) -> None:
    model = make_model(name).to(dtype)
    blocks = engine.find_blocks(model)
    chunks = make_chunks(random_ids(PADDED), (2,), 3, 0)
    steps = BlockPass(model, blocks, chunks, torch.device("cpu"))
    with guard.left_as_found(model):
        steps.capture()
        layers = [x for x in find_layers(blocks)[0] if x.block == 0]
        problem = BlockTuning(blocks.modules[0], layers, chunks, 0)
        assert (problem.sequences, problem.heldout) == (6, 1)
        grids = {k: IntegerGrid.fit(w, 3, -1, True, dtype) for k, w in problem.weights.items()}
        results = AutoRound(iters=25).round_block(problem, grids, progress=False)
        nearest = {k: grids[k].round(w) for k, w in problem.weights.items()}
        before = float(problem.loss(nearest, range(6)))
        after = float(problem.loss({k: r.weight for k, r in results.items()}, range(6)))
    assert after < 0.95 * before
    assert all(p.grad is None for p in model.parameters())
    for layer in layers:
        result = results[layer.name]
        assert result.grid.holds(result.weight.to(dtype))
