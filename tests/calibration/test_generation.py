from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_model
from torch.nn import functional

from lm_calib_plugin.calibration import generation
from lm_calib_plugin.calibration.sampling import (
    UNTRUNCATED,
    Decoding,
    Schedule,
    candidates,
    next_tokens,
    pick,
    uniform_numbers,
)
from lm_calib_plugin.calibration.tokens import encode
from lm_calib_plugin.errors import NumericalError
from tests.tiny import ARCHITECTURES, VOCAB, make_model


def everything(model):
    return torch.ones(model.config.vocab_size, dtype=torch.bool)


def ids_of(rows):
    return [row.ids for row in rows]


def test_cached_steps_equal_full_forwards(stories):
    """Write with the cache, then again with one whole forward per token."""
    model, decoding = stories.model, Decoding(temperature=1.0)
    prefixes = torch.tensor([[1, 10], [1, 20], [1, 33]])
    numbers = uniform_numbers(0, 0, 3, 40)
    rows = generation.write_batch(
        model, prefixes.tolist(), numbers, decoding, everything(model), frozenset()
    )
    history = prefixes
    with torch.no_grad():
        for step in range(40):
            logits = model(input_ids=history, use_cache=False).logits[:, -1]
            token = pick(
                *candidates(logits, history, decoding, everything(model)), numbers[:, step]
            )
            history = torch.cat([history, token[:, None]], dim=1)
    assert ids_of(rows) == history[:, 2:].tolist()


def test_a_text_does_not_depend_on_its_batch(stories):
    model = stories.model
    prefixes = [[1, 10], [1, 20], [1, 33], [1, 12]]
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
    prefixes = [[3, 4], [5, 6]]
    numbers = uniform_numbers(0, 0, 2, 20)
    free = generation.write_batch(
        model, prefixes, numbers, Decoding(), everything(model), frozenset()
    )
    end = free[0].ids[6]
    steps = []
    rows = generation.write_batch(
        model,
        prefixes,
        numbers,
        Decoding(),
        everything(model),
        frozenset({end}),
        on_tokens=steps.append,
    )
    for row, whole in zip(rows, free, strict=True):
        cut = whole.ids.index(end) if end in whole.ids else len(whole.ids)
        assert row.ids == whole.ids[:cut]
        assert row.end == (end if end in whole.ids else None)
    assert sum(steps) == sum(len(row.ids) for row in rows)


def test_dropping_ended_texts_from_the_batch_changes_nothing(stories, monkeypatch):
    model = stories.model
    prefixes = [[1, i] for i in range(10, 26)]
    arguments = (prefixes, uniform_numbers(1, 0, 16, 30), Decoding(temperature=1.0))
    free = generation.write_batch(model, *arguments, everything(model), frozenset())
    ends = frozenset(
        row.ids[3 * i] for i, row in enumerate(free[:10])
    )  # they end all along the way
    shrinking = generation.write_batch(model, *arguments, everything(model), ends)
    monkeypatch.setattr(generation, "_SHRINK_AT", 0.0)
    assert shrinking == generation.write_batch(model, *arguments, everything(model), ends)
    assert len({len(row.ids) for row in shrinking}) > 4
    monkeypatch.setattr(generation, "_SHRINK_AT", 1.0)
    assert shrinking == generation.write_batch(model, *arguments, everything(model), ends)


def test_forbidden_tokens_are_never_written():
    model = tiny_model()
    allowed = torch.zeros(63, dtype=torch.bool)
    allowed[[7, 8, 9]] = True
    rows = generation.write_batch(
        model,
        [[3]],
        uniform_numbers(0, 0, 1, 30),
        Decoding(top_p=1.0),
        allowed,
        frozenset(),
    )
    assert set(rows[0].ids) <= {7, 8, 9}


def test_perplexity_is_exp_of_the_mean_nll(stories, monkeypatch):
    ids = [1, *range(10, 60)]
    with torch.no_grad():
        logits = stories.model(torch.tensor([ids])).logits[0, :-1]
    wanted = math.exp(functional.cross_entropy(logits, torch.tensor(ids[1:])).item())
    monkeypatch.setattr(generation, "_NLL_SLICE", 7)
    assert generation.perplexity(stories.model, ids) == pytest.approx(wanted, rel=1e-5)
    with torch.no_grad():
        tail = functional.cross_entropy(logits[19:], torch.tensor(ids[20:])).item()
    assert generation.mean_nll(stories.model, ids, first=20) == pytest.approx(tail, rel=1e-5)
    with pytest.raises(ValueError, match="another before it"):
        generation.perplexity(stories.model, [1])
    with pytest.raises(ValueError, match="another before it"):
        generation.mean_nll(stories.model, [1, 2, 3], first=3)


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


def plain_loop(model, prefix, numbers, schedule, ends, start):
    """One row, one whole forward a token, everything in plain Python."""
    ids, age = list(prefix), 0
    for number in numbers:
        if ids[-1] in ends and ids[-1] != start and len(ids) > len(prefix):
            ids.append(start)
            age = 0
            continue
        temperature = schedule.start + (schedule.end - schedule.start) * min(1, age / schedule.ramp)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        weights = (logits.double() / temperature).softmax(-1).cumsum(-1)
        ids.append(int((weights <= float(number) * float(weights[-1])).sum()))
        age = 0 if ids[-1] == start else age + 1
    return ids[len(prefix) :]


@pytest.mark.parametrize("start", [1, 2], ids=["own start token", "start is end"])
def test_schedule_and_restarts_against_a_plain_loop(start):
    model = tiny_model().eval()
    schedule, numbers = Schedule(3.0, 0.7, 5), uniform_numbers(0, 0, 6, 60)
    ends = frozenset({2, 11, 12, 13})
    rows = generation.write_batch(
        model,
        [[start]] * 6,
        numbers,
        UNTRUNCATED,
        everything(model),
        ends,
        schedule=schedule,
        restart=start,
    )
    for row, own in zip(rows, numbers, strict=True):
        assert row.ids == plain_loop(model, [start], own, schedule, ends, start)
        assert len(row.ids) == 60
    followers = [
        (a, b) for row in rows for a, b in zip(row.ids, row.ids[1:], strict=False) if a in ends
    ]
    assert len(followers) > 5
    assert all(b == start for a, b in followers if a != start)


def test_prefixes_of_any_length_share_a_batch(stories, monkeypatch):
    model = stories.model
    prefixes = [[1, 10, 11, 12, 13], [1, 20], [1, 33, 4], [1], [1, 40, 41, 42, 43, 44, 45]]
    numbers = uniform_numbers(5, 0, 5, 20)
    arguments = (Decoding(temperature=1.0), everything(model))
    for ends in (frozenset(), frozenset(range(0, 500, 9))):
        together = generation.write_batch(model, prefixes, numbers, *arguments, ends)
        alone = [
            generation.write_batch(model, [prefix], numbers[i : i + 1], *arguments, ends)[0]
            for i, prefix in enumerate(prefixes)
        ]
        assert together == alone
        assert max(len(row.ids) for row in together) <= 20
        assert ends or all(len(row.ids) == 20 for row in together)


def test_looking_now_and_then_changes_nothing(stories, monkeypatch):
    """What an accelerator does: ended texts stay in the batch for a while."""
    model = stories.model
    prefixes = [[1, i] for i in range(10, 22)]
    arguments = (prefixes, uniform_numbers(2, 0, 12, 37), Decoding(), everything(model))
    ends, tokens = frozenset(range(0, 500, 40)), []
    wanted = generation.write_batch(model, *arguments, ends)
    monkeypatch.setattr(generation, "_looks_every", lambda device: 8)
    found = generation.write_batch(model, *arguments, ends, on_tokens=tokens.append)
    assert found == wanted
    assert sum(tokens) == sum(len(row.ids) for row in wanted)
    assert len(tokens) <= 5


def test_broken_logits_stop_with_the_stage():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(NumericalError, match="self-generated text"):
        generation.write_batch(
            model, [[3]], uniform_numbers(0, 0, 1, 9), Decoding(), everything(model), frozenset()
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_writes_with_its_cache(name):
    """No mask is handed over; positions have to follow from the cache alone."""
    model = make_model(name)
    numbers = uniform_numbers(0, 0, 2, 14)
    prefixes = torch.tensor([[3, 4, 5], [6, 7, 8]])
    allowed = torch.ones(VOCAB, dtype=torch.bool)
    rows = generation.write_batch(
        model, prefixes.tolist(), numbers, UNTRUNCATED, allowed, frozenset()
    )
    history = prefixes
    with torch.no_grad():
        for step in range(14):
            logits = model(
                input_ids=history, attention_mask=torch.ones_like(history), use_cache=False
            ).logits[:, -1]
            token, _ = next_tokens(logits, history, UNTRUNCATED, allowed, numbers[:, step])
            history = torch.cat([history, token[:, None]], dim=1)
    assert ids_of(rows) == history[:, 3:].tolist()
