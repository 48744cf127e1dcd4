"""``self:prefix?mode=paper``, ``self:bos`` and ``self:chat``."""

from __future__ import annotations

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import WORDS, context, draw, numbered, tiny_model, word_tokenizer

from lm_calib_plugin.calibration import openings
from lm_calib_plugin.calibration.generation import mean_nll, perplexity
from lm_calib_plugin.calibration.packers import Windows
from lm_calib_plugin.calibration.sources import self_prefix
from lm_calib_plugin.calibration.sources.base import Document
from lm_calib_plugin.calibration.sources.self_bos import start_id
from lm_calib_plugin.calibration.sources.self_chat import closing_ids, prompt_ids
from lm_calib_plugin.calibration.tokens import encode
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.storage import cache_dir


def pool_of(record):
    lines = (cache_dir() / record["text_file"]).read_text().split("\n")[1:]
    return [json.loads(line) for line in lines if line]


# --- self:prefix


def test_self_is_short_for_self_prefix(words, model):
    short, long = (
        Recipe(method="wanda", sparsity=0.5, calibration=c) for c in ("self", "self:prefix")
    )
    assert short == long
    assert draw("self:prefix", words, model).calib_id == draw("self", words, model).calib_id


@pytest.fixture
def paper(tmp_path, monkeypatch):
    monkeypatch.setitem(self_prefix.PAPER, "max_new_tokens", 20)
    path = tmp_path / "openings.txt"
    path.write_text("\n".join(numbered(9, 5)))
    return f"self:prefix?mode=paper&pool=41&prefixes={path}"


def test_paper_mode_keeps_strictly_below_the_percentile_and_draws_with_replacement(
    words, model, paper
):
    drawn = draw(paper, words, model, model_id="m", nsamples=50, seqlen=9)
    (record,) = drawn.sources
    texts = pool_of(record)
    assert len(texts) == 41
    scores = [text["perplexity"] for text in texts]
    for text, score in zip(texts, scores, strict=True):
        assert score == pytest.approx(perplexity(model, encode(words, text["text"], True)))
    bound = np.percentile(scores, 80)
    kept = [text["text"] for text, score in zip(texts, scores, strict=True) if score < bound]
    assert [text["text"] for text in texts if not text["dropped"]] == kept
    assert {text["dropped"] for text in texts} == {"", "perplexity"}
    joined = encode(words, " ".join(kept))
    for start, ids in zip(record["indices"], drawn.sequences, strict=True):
        assert ids.tolist() == joined[start : start + 9]
    assert len(joined) < 41 * 22
    near = sorted(record["indices"])
    assert any(b - a < 9 for a, b in itertools.pairwise(near))  # windows overlap
    assert record["pack"] == "windows"
    assert record["settings"]["dedup"] == 0
    assert any("41 texts; published: 5000" in line for line in record["differs_from_published"])


def test_a_pool_of_fixed_size_serves_every_amount_and_length(words, model, paper):
    draw(paper, words, model, model_id="m", nsamples=5, seqlen=9)
    draw(paper, words, model, model_id="m", nsamples=50, seqlen=12)
    assert len(list((cache_dir() / "self-generated").glob("*.jsonl"))) == 1


def test_paper_mode_refuses_another_packing_and_small_pools(words, model, paper):
    with pytest.raises(UserError, match="pack=windows, got concat; drop `pack`"):
        draw(paper, words, model, pack="concat")
    with pytest.raises(UserError, match="lower seqlen or nsamples, raise pool"):
        draw(paper.replace("pool=41", "pool=2"), words, model, seqlen=50)


def test_windows_begin_anywhere(words):
    documents = [Document(i, text) for i, text in enumerate(numbered(6, 7))]
    packed = Windows().pack(documents, context(words, count=400, seqlen=40), " ")
    joined = encode(words, " ".join(document.text for document in documents))
    assert set(packed.indices) == set(range(3))
    assert all(
        ids == joined[start : start + 40]
        for ids, start in zip(packed.sequences, packed.indices, strict=True)
    )
    with pytest.raises(UserError, match="found 0 windows of 43 tokens in 6 documents"):
        Windows().pack(documents, context(words, seqlen=43), " ")


def test_guards_are_counted_and_can_be_switched_off(words, model, tmp_path):
    path = tmp_path / "openings.txt"
    path.write_text("\n".join(numbered(9, 5)))
    start = f"self?prefixes={path}&top_k=1&max_new_tokens=30"  # one opening, one text
    both = draw(start + "&pool=30", words, model, nsamples=2).sources[0]["generation"]
    assert both["dropped"]["near_duplicate"] + both["dropped"]["repetition"] >= 21
    off = draw(start + "&pool=30&dedup=0&repetition=0", words, model, nsamples=2)
    lost = off.sources[0]["generation"]["dropped"]
    assert lost["near_duplicate"] == lost["repetition"] == 0
    with pytest.raises(UserError, match="set repetition=0 or dedup=0"):
        draw(start, words, model, nsamples=200)


# --- self:bos


def test_sequences_are_ids_as_written(words, model):
    drawn = draw("self:bos", words, model, model_id="m", nsamples=6, seqlen=30)
    (record,) = drawn.sources
    assert [len(ids) for ids in drawn.sequences] == [30] * 6
    assert all(int(ids[0]) == 1 for ids in drawn.sequences)
    assert record["pack"] is None
    texts = pool_of(record)
    assert [text["ids"] for text in texts] == [ids.tolist() for ids in drawn.sequences]
    assert texts[0]["text"].startswith("<s> w")
    for ids, nll in zip(drawn.sequences, record["mean_nll"], strict=True):
        assert nll == pytest.approx(mean_nll(model, ids.tolist()), abs=1e-5)
    assert record["generation"]["tokens"] == 6 * 29
    assert draw("self:bos", words, model, model_id="m", nsamples=6, seqlen=30).calib_id == (
        drawn.calib_id
    )


def test_an_end_restarts_inside_the_window_or_is_suppressed(words, model):
    drawn = draw("self:bos", words, model, nsamples=20, seqlen=60)
    ids = torch.stack(list(drawn.sequences))
    ends = (ids[:, :-1] == 2).nonzero().tolist()
    assert ends
    assert all(int(ids[row, place + 1]) == 1 for row, place in ends)
    assert int((ids[:, 1:] == 1).sum()) == len(ends) == drawn.sources[0]["restarts"]
    assert not (ids == 0).any()  # no other special token
    quiet = draw("self:bos?eos=suppress", words, model, nsamples=20, seqlen=60)
    assert all(int(ids[1:].min()) >= 3 for ids in quiet.sequences)


def test_bos_does_not_depend_on_the_batch_and_depends_on_seed_and_schedule(words, model):
    ids = {draw(f"self:bos?batch_size={n}", words, model, nsamples=5).calib_id for n in (1, 2, 64)}
    assert len(ids) == 1
    for other in ("self:bos?t0=0.5", "self:bos?t1=3", "self:bos?ramp=2", "self:bos?eos=suppress"):
        ids.add(draw(other, words, model, nsamples=5, seqlen=40).calib_id)
    ids.add(draw("self:bos", words, model, nsamples=5, calib_seed=1).calib_id)
    assert len(ids) == 6


def test_bos_may_drop_the_least_likely(words, model):
    drawn = draw("self:bos?drop=0.5", words, model, model_id="m", nsamples=4, seqlen=20)
    texts = pool_of(drawn.sources[0])
    assert len(texts) == 8
    kept = [text["perplexity"] for text in texts if not text["dropped"]]
    assert max(kept) <= min(text["perplexity"] for text in texts if text["dropped"])
    assert drawn.sources[0]["mean_nll"] == pytest.approx([math.log(p) for p in kept], abs=1e-6)


def test_start_is_bos_then_eos_then_an_error(words):
    bare = word_tokenizer()
    bare.bos_token = None
    model = tiny_model()
    assert start_id(model, words) == 1
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    assert start_id(model, words) == 1  # the tokenizer's
    assert start_id(model, bare) == 2
    bare.eos_token = None
    model.generation_config.eos_token_id = [5, 2]
    assert start_id(model, bare) == 5
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(UserError, match="neither the tokenizer nor the model has one"):
        start_id(model, bare)
    with pytest.raises(UserError, match="use self:prefix"):
        draw("self:bos", bare, model)


@pytest.mark.parametrize("seqlen", [1, 65])
def test_bos_needs_a_length_the_model_takes(words, model, seqlen):
    with pytest.raises(UserError, match=f"got {seqlen}; `self:bos` writes sequences of 2 to 64"):
        draw("self:bos", words, model, seqlen=seqlen)


# --- self:chat

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> w1 {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@pytest.fixture
def chat(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    numbers = random.Random(0)
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(" ".join(numbers.choices(WORDS, k=k)) for k in (1, 3, 4, 7, 7, 9)))
    return tokenizer, f"self:chat?prompts={path}&max_new_tokens=30", path


def test_conversations_are_the_rendering_of_the_template(chat):
    tokenizer, expression, path = chat
    drawn = draw(expression, tokenizer, tiny_model(), model_id="m", nsamples=5, seqlen=16)
    (record,) = drawn.sources
    texts = pool_of(record)
    kept = [text for text in texts if not text["dropped"]]
    prompts = path.read_text().split("\n")
    for text in kept:
        assert text["finished"]
        prompt = next(
            p
            for p in prompts
            if text["ids"][: len(prompt_ids(tokenizer, p))] == prompt_ids(tokenizer, p)
        )
        answer = tokenizer.decode(text["ids"][len(prompt_ids(tokenizer, prompt)) : -2])
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text["ids"] == encode(tokenizer, whole)
        assert text["tokens"] == len(encode(tokenizer, answer))
    joined = [i for text in kept for i in text["ids"]]
    assert [i for ids in drawn.sequences for i in ids.tolist()] == joined[: 5 * 16]
    assert record["generation"]["dropped"]["unfinished"] > 0
    assert not any(text["finished"] for text in texts if text["dropped"] == "unfinished")


def test_chat_answers_do_not_depend_on_their_batch(chat):
    tokenizer, expression, _ = chat
    drawn = [
        draw(f"{expression}&batch_size={n}", tokenizer, tiny_model(), nsamples=5)
        for n in (1, 4, 64)
    ]
    assert len({d.calib_id for d in drawn}) == 1
    assert draw(expression, tokenizer, tiny_model(), nsamples=5, calib_seed=1).calib_id != (
        drawn[0].calib_id
    )


def test_perplexity_of_an_answer_leaves_the_prompt_out(chat):
    tokenizer, expression, path = chat
    model = tiny_model()
    drawn = draw(expression, tokenizer, model, model_id="m", nsamples=3)
    by_prompt = {tuple(prompt_ids(tokenizer, p)): p for p in path.read_text().split("\n")}
    for text in pool_of(drawn.sources[0])[:6]:
        first = next(len(p) for p in by_prompt if tuple(text["ids"][: len(p)]) == p)
        with torch.no_grad():
            logits = model(torch.tensor([text["ids"]])).logits[0].log_softmax(-1)
        scored = range(first, len(text["ids"]))
        nll = -sum(float(logits[i - 1, text["ids"][i]]) for i in scored) / len(scored)
        assert text["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)


def test_what_the_template_puts_behind_an_answer(chat):
    tokenizer, _, _ = chat
    assert closing_ids(tokenizer, frozenset({2})) == encode(tokenizer, "w1")
    assert closing_ids(tokenizer, frozenset({9})) == []


def test_a_template_with_the_date_gives_the_same_prompt_every_day(chat):
    tokenizer = chat[0]
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b') %}"
        "{% endif %}"
        "{{ date_string }} {{ messages[0]['content'] }}"
    )
    assert prompt_ids(tokenizer, "w5") == encode(tokenizer, "01 Jan 2025 w5")


def test_chat_without_a_way_to_chat_says_what_to_do(words, chat):
    tokenizer, expression, _ = chat
    with pytest.raises(UserError, match="needs a chat template.*use self:prefix or self:bos"):
        draw("self:chat", words, tiny_model())
    with pytest.raises(UserError, match="raise max_new_tokens"):
        draw(
            f"{expression}&max_new_tokens=1".replace("max_new_tokens=30&", ""),
            tokenizer,
            tiny_model(),
        )
    broken = word_tokenizer()
    broken.chat_template = "{{ raise_exception('only system messages') }}"
    with pytest.raises(UserError, match="only system messages"):
        draw("self:chat", broken, tiny_model())


def test_built_in_instructions_are_short_and_varied():
    texts = openings.read_openings(None, openings.INSTRUCTIONS)
    assert len(texts) >= 60
    assert len(set(texts)) == len(texts)
    assert all(4 <= len(text.split()) <= 20 for text in texts)
    assert len({text.split()[0] for text in texts}) >= 20


def test_variants_need_the_model(words):
    for expression in ("self", "self:bos", "self:chat"):
        with pytest.raises(UserError, match=f"`{expression}` needs the model in memory"):
            draw(expression, words)


def test_variants_stand_in_mixes_and_inside_other_sources(words, model):
    mixed = draw("self:bos*0.5+self*0.5", words, model, nsamples=6)
    assert [len(record["rows"]) for record in mixed.sources] == [3, 3]
    plain = draw("self:bos", words, model, nsamples=4, seqlen=30)
    shuffled = draw("null:shuffle(self:bos)", words, model, nsamples=4, seqlen=30)
    assert sorted(torch.cat(list(shuffled.sequences)).tolist()) == sorted(
        torch.cat(list(plain.sequences)).tolist()
    )
    assert shuffled.calib_id != plain.calib_id
