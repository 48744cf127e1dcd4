from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lm_calib_plugin.calibration.sampling import (
    UNTRUNCATED,
    Decoding,
    Schedule,
    candidates,
    next_tokens,
    pick,
    uniform_numbers,
)


def reference(logits, history, decoding, allowed):
    steps = LogitsProcessorList()
    if decoding.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(penalty=decoding.repetition_penalty))
    banned = (~allowed).nonzero()[:, 0].tolist()
    if banned:
        steps.append(SuppressTokensLogitsProcessor(banned, device="cpu"))
    steps.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k:
        steps.append(TopKLogitsWarper(top_k=decoding.top_k))
    if decoding.top_p < 1:
        steps.append(TopPLogitsWarper(top_p=decoding.top_p))
    return steps(history, logits.clone()).softmax(-1)


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(),
        Decoding(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0),
        Decoding(temperature=2.0, top_k=0, top_p=0.5, repetition_penalty=1.0),
        Decoding(temperature=0.1, top_k=7, top_p=1.0, repetition_penalty=1.3),
        Decoding(temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=0.8),
        Decoding(temperature=1.0, top_k=1, top_p=0.01, repetition_penalty=1.2),
        Decoding(temperature=1.0, top_k=1000, top_p=0.9, repetition_penalty=1.1),
    ],
)
def test_probabilities_are_those_of_transformers(decoding):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(6, 300, generator=generator) * 3
    history = torch.randint(0, 300, (6, 40), generator=generator)
    allowed = torch.ones(300, dtype=torch.bool)
    allowed[[0, 1, 17, 250]] = False
    ids, probabilities = candidates(logits, history, decoding, allowed)
    dense = torch.zeros_like(logits).scatter(1, ids, probabilities)
    torch.testing.assert_close(dense, reference(logits, history, decoding, allowed))
    assert torch.all(dense[:, ~allowed] == 0)
    assert torch.all(probabilities.diff(dim=-1) <= 0)


def test_input_logits_are_untouched():
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    candidates(logits, torch.zeros(2, 3, dtype=torch.int64), Decoding(), torch.ones(20) > 0)
    assert torch.equal(logits, before)


def test_picks_follow_the_probabilities():
    ids = torch.tensor([[5, 3, 9, 1]]).expand(20_000, 4)
    wanted = torch.tensor([0.5, 0.3, 0.2, 0.0])
    numbers = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    drawn = pick(ids, wanted.expand(20_000, 4), numbers)
    share = torch.stack([(drawn == i).float().mean() for i in (5, 3, 9, 1)])
    torch.testing.assert_close(share, wanted, atol=0.01, rtol=0)
    assert not (drawn == 1).any()


def test_pick_never_takes_what_was_cut():
    ids, probabilities = torch.tensor([[4, 6, 8]]), torch.tensor([[0.6, 0.4, 0.0]])
    assert pick(ids, probabilities, torch.tensor([0.0])).item() == 4
    assert pick(ids, probabilities, torch.tensor([0.6])).item() == 6
    assert pick(ids, probabilities, torch.tensor([1.0])).item() == 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("decoding", [Decoding(), UNTRUNCATED])
def test_broken_logits_are_told_and_break_nothing(bad, decoding):
    logits = torch.zeros(2, 100)
    everything, history = torch.ones(100) > 0, torch.zeros(2, 1, dtype=torch.int64)
    numbers = torch.tensor([0.3, 0.7])
    assert bool(next_tokens(logits, history, decoding, everything, numbers)[1])
    logits[1, 4] = bad
    ids, sound = next_tokens(logits, history, decoding, everything, numbers)
    assert not bool(sound)
    assert all(0 <= i < 100 for i in ids.tolist())
    assert not bool(next_tokens(torch.zeros(2, 100), history, decoding, ~everything, numbers)[1])


def test_a_draw_over_the_whole_vocabulary_follows_the_plain_softmax():
    """Against a search, in Python, for the first place where the sum passes the number."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, 50, generator=generator) * 2
    numbers, temperature = (torch.rand(200, generator=generator) for _ in range(2))
    allowed = torch.rand(50, generator=generator) > 0.2
    history = torch.zeros(200, 1, dtype=torch.int64)
    ids, _ = next_tokens(logits, history, UNTRUNCATED, allowed, numbers, 0.5 + temperature)
    for row, number, t, i in zip(
        logits.double(), numbers.double(), temperature, ids.tolist(), strict=True
    ):
        weights = (row / (0.5 + t.double())).exp() * allowed
        sums = weights.cumsum(0) / weights.sum()
        assert i == next(place for place in range(50) if sums[place] > number)
        assert allowed[i]


def test_unlikely_tokens_are_drawn_from_the_start_token_on():
    """A thousandth token of a flat distribution is beyond every usual top-k and top-p."""
    logits = torch.zeros(4000, 1000)
    numbers = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    history = torch.zeros(4000, 1, dtype=torch.int64)
    ids, _ = next_tokens(logits, history, UNTRUNCATED, torch.ones(1000) > 0, numbers)
    assert len(ids.unique()) > 950
    cut, _ = next_tokens(logits, history, Decoding(), torch.ones(1000) > 0, numbers)
    assert len(cut.unique()) <= 50


def test_temperature_moves_along_a_straight_line():
    schedule = Schedule(2.0, 1.0, 20)
    wanted = [2.0 + (1.0 - 2.0) * min(1.0, t / 20) for t in range(40)]
    assert schedule.at(torch.arange(40)).tolist() == pytest.approx(wanted)
    assert Schedule(0.5, 1.5, 1).at(torch.arange(3)).tolist() == [0.5, 1.5, 1.5]


def test_numbers_of_a_text_depend_on_seed_and_text_alone():
    whole = uniform_numbers(3, 0, 6, 10)
    assert torch.equal(whole[2:5], uniform_numbers(3, 2, 3, 10))
    assert torch.equal(whole[:, :4], uniform_numbers(3, 0, 6, 4))
    assert not torch.equal(whole, uniform_numbers(4, 0, 6, 10))
    assert len(whole.unique()) > 50
