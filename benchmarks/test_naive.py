"""The naive methods against still plainer formulations, on tiny problems."""

from __future__ import annotations

import copy
import itertools
import math
import random

import pytest
import torch
from naive import compress, linears
from naive_methods import DAMPING, gptq, grid, magnitude, rtn, sparsegpt, wanda
from perplexity import perplexity
from tokens import calibration_windows, evaluation_windows
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(columns: int, tokens: int = 64, seed: int = 1) -> Tensor:
    """Gram matrix of correlated inputs."""
    x = normal(tokens, columns, seed=seed) @ normal(columns, columns, seed=seed + 1)
    return x.T @ x


def with_damping(gram: Tensor) -> Tensor:
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram)).double()


def loss(delta: Tensor, gram: Tensor) -> float:
    return torch.trace(delta @ gram @ delta.T).item()


def removed_by_hand(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda k: (scores[k], k))[:count])


# Masks.


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.7, 1.0])
def test_magnitude_removes_the_exact_count_of_the_whole_matrix(sparsity: float) -> None:
    weight = normal(10, 10).mul(3).round()  # many ties
    flat = weight.flatten().tolist()
    gone = removed_by_hand([abs(w) for w in flat], math.floor(round(100 * sparsity, 6)))
    expected = [0.0 if k in gone else w for k, w in enumerate(flat)]
    assert magnitude(weight, sparsity, None).flatten().tolist() == expected


def test_wanda_removes_the_exact_count_of_each_row() -> None:
    weight, squares = normal(6, 11), normal(11, seed=3).square()
    result = wanda(weight, squares, 0.7, None)
    for row, kept in zip(weight.tolist(), result.tolist(), strict=True):
        scores = [abs(w) * math.sqrt(a) for w, a in zip(row, squares.tolist(), strict=True)]
        gone = removed_by_hand(scores, 7)
        assert kept == [0.0 if j in gone else w for j, w in enumerate(row)]


def test_wanda_of_equal_inputs_is_magnitude_of_each_row() -> None:
    weight = normal(5, 12)
    result = wanda(weight, torch.full((12,), 4.0), 0.5, None)
    for row, kept in zip(weight, result, strict=True):
        assert torch.equal(magnitude(row[None], 0.5, None)[0], kept)


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (1, 3), (4, 8)])
def test_n_of_m_keeps_the_best_subset_of_each_group(keep: int, group: int) -> None:
    weight, squares = normal(3, 24), normal(24, seed=5).square()
    result = wanda(weight, squares, 0.0, (keep, group))
    scores = weight.abs() * squares.sqrt()
    for i, start in itertools.product(range(3), range(0, 24, group)):
        subsets = itertools.combinations(range(start, start + group), keep)
        best = max(subsets, key=lambda subset: sum(scores[i, j].item() for j in subset))
        for j in range(start, start + group):
            assert result[i, j] == (weight[i, j] if j in best else 0)


def test_n_of_m_refuses_a_rest() -> None:
    with pytest.raises(ValueError, match="10 columns"):
        magnitude(normal(2, 10), 0.5, (2, 4))


# SparseGPT.


def sparsegpt_by_hand(weight: Tensor, gram: Tensor, width: int, per_row: bool = False) -> Tensor:
    """Optimal brain surgeon at 50 %, with a fresh inverse of the columns left at each column."""
    gram = with_damping(gram)
    rows, columns = weight.shape
    work = weight.clone()
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        scores = {}
        for j in range(start, stop):
            inverse = torch.linalg.inv(gram[j:, j:])
            for i in range(rows):
                scores[i, j] = (work[i, j] ** 2 / inverse[0, 0]).item()
        gone: set[tuple[int, int]] = set()
        for places in [[i] for i in range(rows)] if per_row else [list(range(rows))]:
            here = [key for key in sorted(scores) if key[0] in places]
            gone |= set(sorted(here, key=lambda key: (scores[key], key))[: len(here) // 2])
        for j in range(start, stop):
            inverse = torch.linalg.inv(gram[j:, j:])
            for i in range(rows):
                if (i, j) in gone:
                    work[i, j:] -= work[i, j] / inverse[0, 0] * inverse[0]
                    work[i, j] = 0
    return work


def test_sparsegpt_is_the_surgeon_with_explicit_inverses() -> None:
    weight, gram = normal(5, 12), gram_of(12)
    expected = sparsegpt_by_hand(weight, gram, width=12)
    torch.testing.assert_close(sparsegpt(weight, gram, 0.5, None), expected)


def test_sparsegpt_chooses_its_mask_128_columns_at_a_time() -> None:
    weight, gram = normal(3, 140), gram_of(140, tokens=300)
    expected = sparsegpt_by_hand(weight, gram, width=128)
    result = sparsegpt(weight, gram, 0.5, None)
    torch.testing.assert_close(result, expected)
    assert (result[:, :128] == 0).sum() == 192


def test_sparsegpt_n_of_m_scores_each_group_again() -> None:
    weight, gram = normal(5, 16), gram_of(16)
    expected = sparsegpt_by_hand(weight, gram, width=4, per_row=True)
    result = sparsegpt(weight, gram, 0.5, (2, 4))
    torch.testing.assert_close(result, expected)
    assert ((result.reshape(5, 4, 4) != 0).sum(-1) == 2).all()


def test_sparsegpt_of_leading_columns_is_the_least_squares_fit_of_the_others() -> None:
    weight, gram = normal(4, 10), gram_of(10)
    weight[:, :4] *= 1e-4
    result = sparsegpt(weight, gram, 0.4, None)
    assert (result[:, :4] == 0).all()
    full = with_damping(gram)
    fit = torch.linalg.solve(full[4:, 4:], full[4:] @ weight.T).T
    torch.testing.assert_close(result[:, 4:], fit)


def test_sparsegpt_of_uncorrelated_inputs_only_removes() -> None:
    weight, gram = normal(4, 8), torch.diag(normal(8, seed=4).square() + 0.1)
    result = sparsegpt(weight, gram, 0.5, None)
    scores = weight.square() * with_damping(gram).diagonal()
    gone = removed_by_hand(scores.flatten().tolist(), 16)
    for k, (before, after) in enumerate(zip(weight.flatten(), result.flatten(), strict=True)):
        assert after == (0 if k in gone else before)


def test_sparsegpt_does_not_depend_on_the_scale_of_the_gram() -> None:
    weight, gram = normal(4, 8), gram_of(8)
    torch.testing.assert_close(
        sparsegpt(weight, gram, 0.5, None), sparsegpt(weight, gram / 4096, 0.5, None)
    )


def test_a_dead_column_is_pruned_first_and_moves_nothing() -> None:
    weight, gram = normal(4, 8) + 3, gram_of(8)
    weight[:, 2] = 1e6
    gram[2] = gram[:, 2] = 0
    assert torch.equal(sparsegpt(weight, gram, 0.0, None), weight)
    result = sparsegpt(weight, gram, 0.125, None)
    assert (result[:, 2] == 0).all()
    live = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(result[:, live], weight[:, live])


# Rounding.


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(3, 4), (2, 8), (4, 3)])
def test_rtn_is_the_written_formula(bits: int, group_size: int, symmetric: bool) -> None:
    weight = normal(6, 8)
    weight[1, :4], weight[2] = 0, weight[2].abs()  # a group of zeros, a row of one sign
    result = rtn(weight, bits, group_size, symmetric)
    for i, start in itertools.product(range(6), range(0, 8, group_size)):
        row = weight[i, start : start + group_size].tolist()
        if symmetric:
            scale = max(abs(w) for w in row) / (2 ** (bits - 1) - 0.5) or 1.0
            low, high, zero = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0
        else:
            least = min(0.0, *row)
            scale = (max(0.0, *row) - least) / (2**bits - 1) or 1.0
            low, high = 0, 2**bits - 1
            zero = min(max(round(-least / scale), low), high)
        expected = [scale * (min(max(round(w / scale) + zero, low), high) - zero) for w in row]
        assert result[i, start : start + group_size].tolist() == pytest.approx(expected, abs=1e-12)


def gptq_by_hand(weight: Tensor, gram: Tensor, bits: int, group_size: int, order: list[int]):
    """Quantize one weight after the other, with a fresh inverse of the columns left."""
    scale, zero = grid(weight, bits, group_size, symmetric=True)
    gram = with_damping(gram)
    work = weight.clone()
    for step, j in enumerate(order):
        left = order[step:]
        inverse = torch.linalg.inv(gram[left][:, left])
        for i in range(len(weight)):
            level = round((work[i, j] / scale[i, j]).item()) + int(zero[i, j].item())
            value = (min(max(level, 0), 2**bits - 1) - zero[i, j]) * scale[i, j]
            work[i, left] -= (work[i, j] - value) / inverse[0, 0] * inverse[0]
            work[i, j] = value
    return work


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_is_the_surgeon_with_explicit_inverses(act_order: bool) -> None:
    weight, gram = normal(5, 12), gram_of(12)
    diagonal = gram.diagonal().tolist()
    order = sorted(range(12), key=lambda j: (-diagonal[j], j)) if act_order else list(range(12))
    assert act_order == (order != list(range(12)))
    expected = gptq_by_hand(weight, gram, 3, 4, order)
    torch.testing.assert_close(gptq(weight, gram, 3, 4, True, act_order), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_of_uncorrelated_inputs_is_rtn(symmetric: bool, act_order: bool) -> None:
    weight, gram = normal(5, 12), torch.diag(normal(12, seed=4).square() + 0.1)
    for matrix in (gram, torch.eye(12)):
        result = gptq(weight, matrix, 3, 4, symmetric, act_order)
        torch.testing.assert_close(result, rtn(weight, 3, 4, symmetric))


def test_gptq_stays_on_the_grid_and_loses_less_than_rtn() -> None:
    weight, gram = normal(32, 64), gram_of(64, tokens=256)
    rounded, swept = rtn(weight, 3, 16, True), gptq(weight, gram, 3, 16, True, True)
    scale, _ = grid(weight, 3, 16, True)
    levels = swept / scale
    torch.testing.assert_close(levels, levels.round())
    assert levels.min() >= -4 - 1e-9
    assert levels.max() <= 3 + 1e-9
    assert loss(weight - swept, gram) < 0.7 * loss(weight - rounded, gram)


def test_gptq_rounds_a_dead_column_to_nearest() -> None:
    weight, gram = normal(5, 12), gram_of(12)
    gram[7] = gram[:, 7] = 0
    result = gptq(weight, gram, 3, 4, True, True)
    torch.testing.assert_close(result[:, 7], rtn(weight, 3, 4, True)[:, 7])


def test_gptq_without_any_input_is_rtn() -> None:
    weight = normal(5, 12)
    result = gptq(weight, torch.zeros(12, 12), 3, 4, True, True)
    torch.testing.assert_close(result, rtn(weight, 3, 4, True))


# The walk over the blocks, the perplexity and the windows.


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


SAMPLES = [[random.Random(k).randrange(50) for _ in range(20)] for k in range(4)]


@torch.no_grad()
def inputs_of(model: torch.nn.Module, part: torch.nn.Module) -> Tensor:
    """All inputs that reach a layer in plain forward passes of the whole model."""
    seen: list[Tensor] = []
    handle = part.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    for ids in SAMPLES:
        model(torch.tensor([ids]))
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_each_block_sees_the_compressed_blocks_before_it(
    model: torch.nn.Module, method: str
) -> None:
    work = copy.deepcopy(model)
    compress(work, SAMPLES, method, sparsity=0.5, pattern=None)
    for index in range(3):
        half = copy.deepcopy(model)  # compressed before this block, dense from it on
        half.model.layers[:index].load_state_dict(work.model.layers[:index].state_dict())
        for name, part in linears(half.model.layers[index]).items():
            x = inputs_of(half, part)
            if method == "wanda":
                expected = wanda(part.weight, x.square().sum(0), 0.5, None)
            else:
                expected = sparsegpt(part.weight, x.T @ x, 0.5, None)
            result = linears(work.model.layers[index])[name].weight
            torch.testing.assert_close(result, expected, msg=f"block {index}, {name}")
    assert torch.equal(work.lm_head.weight, model.lm_head.weight)


def test_perplexity_is_the_exponential_of_the_models_own_loss(model: torch.nn.Module) -> None:
    ids = torch.tensor(SAMPLES)
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.exp().item()
    assert perplexity(model, SAMPLES) == pytest.approx(expected, rel=1e-5)


def test_windows_are_pieces_of_long_documents() -> None:
    def encode(text: str) -> list[int]:
        return [int(word) for word in text.split()]

    documents = [" ".join(str(100 * k + j) for j in range(k)) for k in range(1, 30)]
    drawn = calibration_windows(documents, encode, samples=10, length=8, seed=0)
    assert len({window[0] // 100 for window in drawn}) == 10
    for window in drawn:
        assert window == list(range(window[0], window[0] + 8))
    assert drawn == calibration_windows(documents, encode, samples=10, length=8, seed=0)
    with pytest.raises(ValueError, match="21 documents exceed 8 tokens"):
        calibration_windows(documents, encode, samples=22, length=8, seed=0)
    assert evaluation_windows("0 1 2 3 4 5 6", encode, 5, 2) == [[0, 1], [2, 3]]
