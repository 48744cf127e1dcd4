from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_model
from torch.nn import functional

from lm_calib_plugin.calibration import generation
from lm_calib_plugin.calibration.sampling import Decoding, candidates, pick, uniform_numbers
from lm_calib_plugin.calibration.tokens import encode


def everything(model):
    return torch.ones(model.config.vocab_size, dtype=torch.bool)


def test_cached_steps_equal_full_forwards(stories):
    """Write with the cache, then again with one whole forward per token."""
    model, decoding = stories.model, Decoding(temperature=1.0)
    prefixes = torch.tensor([[1, 10], [1, 20], [1, 33]])
    numbers = uniform_numbers(0, 0, 3, 40)
    rows = generation.write_batch(
        model, prefixes, numbers, decoding, everything(model), frozenset()
    )
    history = prefixes
    with torch.no_grad():
        for step in range(40):
            logits = model(input_ids=history, use_cache=False).logits[:, -1]
            token = pick(
                *candidates(logits, history, decoding, everything(model)), numbers[:, step]
            )
            history = torch.cat([history, token[:, None]], dim=1)
    assert rows == history[:, 2:].tolist()


def test_a_text_does_not_depend_on_its_batch(stories):
    model = stories.model
    prefixes = torch.tensor([[1, 10], [1, 20], [1, 33], [1, 12]])
    arguments = (Decoding(), everything(model), frozenset({2}))
    together = generation.write_batch(model, prefixes, uniform_numbers(5, 0, 4, 30), *arguments)
    alone = [
        generation.write_batch(
            model, prefixes[i : i + 1], uniform_numbers(5, i, 1, 30), *arguments
        )[0]
        for i in range(4)
    ]
    assert together == alone


def test_end_token_ends_a_text_and_is_not_part_of_it():
    model = tiny_model()
    prefixes = torch.tensor([[3, 4], [5, 6]])
    numbers = uniform_numbers(0, 0, 2, 20)
    free = generation.write_batch(
        model, prefixes, numbers, Decoding(), everything(model), frozenset()
    )
    end = free[0][6]
    steps = []
    rows = generation.write_batch(
        model, prefixes, numbers, Decoding(), everything(model), frozenset({end}), steps.append
    )
    for row, whole in zip(rows, free, strict=True):
        cut = whole.index(end) if end in whole else len(whole)
        assert row == whole[:cut]
    assert sum(steps) == sum(map(len, rows))


def test_dropping_ended_texts_from_the_batch_changes_nothing(stories, monkeypatch):
    model = stories.model
    prefixes = torch.tensor([[1, i] for i in range(10, 26)])
    arguments = (prefixes, uniform_numbers(1, 0, 16, 30), Decoding(temperature=1.0))
    free = generation.write_batch(model, *arguments, everything(model), frozenset())
    ends = frozenset(row[3 * i] for i, row in enumerate(free[:10]))  # they end all along the way
    shrinking = generation.write_batch(model, *arguments, everything(model), ends)
    monkeypatch.setattr(generation, "_SHRINK_AT", 0.0)
    assert shrinking == generation.write_batch(model, *arguments, everything(model), ends)
    assert len({len(row) for row in shrinking}) > 4
    monkeypatch.setattr(generation, "_SHRINK_AT", 1.0)
    assert shrinking == generation.write_batch(model, *arguments, everything(model), ends)


def test_forbidden_tokens_are_never_written():
    model = tiny_model()
    allowed = torch.zeros(63, dtype=torch.bool)
    allowed[[7, 8, 9]] = True
    rows = generation.write_batch(
        model,
        torch.tensor([[3]]),
        uniform_numbers(0, 0, 1, 30),
        Decoding(top_p=1.0),
        allowed,
        frozenset(),
    )
    assert set(rows[0]) <= {7, 8, 9}


def test_perplexity_is_exp_of_the_mean_nll(stories, monkeypatch):
    ids = [1, *range(10, 60)]
    with torch.no_grad():
        logits = stories.model(torch.tensor([ids])).logits[0, :-1]
    wanted = math.exp(functional.cross_entropy(logits, torch.tensor(ids[1:])).item())
    monkeypatch.setattr(generation, "_NLL_SLICE", 7)
    assert generation.perplexity(stories.model, ids) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="two tokens"):
        generation.perplexity(stories.model, [1])


def test_trained_model_finds_its_own_text_likelier_than_noise(stories):
    if len(stories.tokenizer) != 512:
        pytest.skip("the trained model is not here")
    story = encode(stories.tokenizer, "Once upon a time, there was a little girl named Lily.")
    noise = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    likely = generation.perplexity(stories.model, story)
    assert likely < generation.perplexity(stories.model, noise) / 10


def test_end_ids_come_from_every_place(stories, words):
    model = tiny_model()
    model.generation_config.eos_token_id = [2, 5]
    assert generation.end_ids(model, words) == {2, 5}
    assert generation.position_limit(model) == 64
