from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import STORIES, draw, numbered, tiny_model, word_tokenizer, write_jsonl
from test_build import states

from lm_calib_plugin.calibration import openings, writer
from lm_calib_plugin.calibration.generation import Continuation
from lm_calib_plugin.calibration.sources.self_prefix import SelfFromPrefix
from lm_calib_plugin.calibration.writer import cut_prefixes
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.storage import cache_dir


@pytest.fixture
def start(tmp_path):
    """A file of openings in the words of the tiny tokenizer."""
    path = tmp_path / "openings.txt"
    path.write_text("\n".join(numbered(9, 5)) + "\n")
    return f"self?prefixes={path}"


def cache_files():
    return sorted((cache_dir() / "self-generated").glob("*.jsonl"))


def test_enough_text_is_written_and_recorded(words, model, start):
    drawn = draw(start, words, model, nsamples=5, seqlen=16)
    assert [len(ids) for ids in drawn.sequences] == [16] * 5
    (record,) = drawn.sources
    assert record["pack"] == "concat"
    facts = record["generation"]
    lost = facts["dropped"]
    passed = facts["texts"] - sum(lost.values()) + lost["perplexity"]
    assert lost["perplexity"] == int(0.2 * passed)
    assert facts["kept"] == passed - lost["perplexity"]
    assert facts["tokens"] > 0
    assert facts["tokens_per_second"] > 0
    assert facts["perplexity"]["highest_kept"] <= facts["perplexity"]["highest"]
    assert record["settings"]["top_k"] == 50
    assert record["warnings"] == []
    assert cache_files() == []  # a model without a name is not cached


def test_special_tokens_are_never_written(words, model, start):
    drawn = draw(start + "&repetition_penalty=1&top_p=1&top_k=0", words, model, nsamples=20)
    assert all(int(ids.min()) >= 3 for ids in drawn.sequences)


def test_same_text_with_and_without_cache(words, model, start):
    plain = draw(start, words, model)
    first = draw(start, words, model, model_id="m")
    (path,) = cache_files()
    stamp = path.stat().st_mtime_ns
    again = draw(start, words, model, model_id="m")
    assert plain.calib_id == first.calib_id == again.calib_id
    assert first.sources == again.sources
    assert path.stat().st_mtime_ns == stamp
    header, *lines = path.read_text().splitlines()
    assert json.loads(header)["settings"]["model"] == "m"
    assert set(json.loads(lines[0])) == {"text", "tokens", "finished", "perplexity", "dropped"}
    assert (cache_dir() / first.sources[0]["text_file"]) == path
    assert plain.sources[0]["text_file"] is None


def test_everything_that_decides_the_text_names_the_cache(words, model, start):
    drawn = {draw(start, words, model, model_id="m").calib_id}
    for changed in (
        {"calib_seed": 1},
        {"nsamples": 6},
        {"seqlen": 9},
        {"model_id": "other"},
    ):
        drawn.add(draw(start, words, model, **{"model_id": "m", **changed}).calib_id)
    draw(start + "&temperature=1.5", words, model, model_id="m")
    assert len(cache_files()) == 6
    assert len(drawn) == 4  # another name of the same model writes the same text


@pytest.mark.parametrize("damage", ["flip", "cut", "bytes", "header"])
def test_a_damaged_cache_is_written_again_with_a_warning(words, model, start, damage):
    first = draw(start, words, model, model_id="m")
    (path,) = cache_files()
    content = path.read_bytes()
    head, _, body = content.partition(b"\n")
    path.write_bytes(
        {
            "flip": content.replace(b'"dropped": ""', b'"dropped": "no"', 1),
            "cut": content[:-20],
            "bytes": b"\xff" + content,
            "header": head[:-5] + b"\n" + body,
        }[damage]
    )
    again = draw(start, words, model, model_id="m")
    assert again.calib_id == first.calib_id
    (warning,) = again.sources[0]["warnings"]
    assert path.name in warning
    assert "generated again" in warning
    assert draw(start, words, model, model_id="m").sources[0]["warnings"] == []


def test_model_and_random_state_are_left_as_found(words, model, start):
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = states()
    draw(start, words, model)
    assert [module.training for module in model.modules()] == flags
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert states() == before
    assert torch.is_grad_enabled()


def test_state_is_left_as_found_after_an_exception(words, model, start):
    model.train()
    before = states()
    forward = model.forward
    calls = []

    def failing(*arguments, **named):
        calls.append(1)
        torch.rand(1)
        if len(calls) > 3:
            raise RuntimeError("on purpose")
        return forward(*arguments, **named)

    model.forward = failing
    with pytest.raises(RuntimeError, match="on purpose"):
        draw(start, words, model, model_id="m")
    assert model.training
    assert torch.is_grad_enabled()
    assert states() == before
    assert cache_files() == []


def test_text_does_not_depend_on_the_batch_size(stories):
    ids = {
        draw(
            f"self?batch_size={size}",
            stories.tokenizer,
            stories.model,
            seqlen=24,
            vocab_size=stories.model.config.vocab_size,
        ).calib_id
        for size in (1, 3, 32)
    }
    assert len(ids) == 1


def test_batches_shrink_when_memory_is_short(words, model, start):
    forward = model.forward

    def small(input_ids=None, **named):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("no room")
        return forward(input_ids=input_ids, **named)

    wanted = draw(start, words, model, nsamples=8).calib_id
    model.forward = small
    drawn = draw(start, words, model, nsamples=8)
    assert drawn.calib_id == wanted
    assert drawn.sources[0]["generation"]["batch_size"] <= 2
    model.forward = lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
    with pytest.raises(CalibError, match="out of memory with one text at a time"):
        draw(start, words, model)


def test_a_model_that_writes_nothing_ends_in_a_message(words, model, start, monkeypatch):
    monkeypatch.setattr(
        writer,
        "write_batch",
        lambda model, prefixes, *_, **__: [Continuation([], 2)] * len(prefixes),
    )
    with pytest.raises(UserError) as error:
        draw(start, words, model)
    assert "dropped (empty)" in str(error.value)
    assert "found 0 windows of 8 tokens, recipe asks 4" in str(error.value)


def test_more_rounds_are_written_when_texts_end_early(words, model, start, monkeypatch):
    original = writer.write_batch
    monkeypatch.setattr(
        writer,
        "write_batch",
        lambda *a, **n: [Continuation(row.ids[:3], 2) for row in original(*a, **n)],
    )
    drawn = draw(start, words, model, nsamples=6)
    facts = drawn.sources[0]["generation"]
    assert facts["rounds"] > 1
    assert facts["finished"] == facts["texts"]


def test_seqlen_beyond_the_model_is_made_of_several_texts(words, model, start):
    drawn = draw(start, words, model, nsamples=2, seqlen=100)
    assert [len(ids) for ids in drawn.sequences] == [100, 100]
    assert drawn.sources[0]["settings"]["max_new_tokens"] == 62


def test_errors_before_anything_is_written(words, model, start):
    with pytest.raises(UserError, match="needs the model in memory"):
        draw(start, words)
    with pytest.raises(UserError, match="prefix_tokens=9: the longest of 9 openings has 5 tokens"):
        draw(start + "&prefix_tokens=9", words, model)
    with pytest.raises(UserError, match="leaves no room"):
        draw(start + "&prefix_tokens=64", words, model)
    with pytest.raises(UserError, match=r"id \d+ >= 5 rows"):
        draw(start, words, model, vocab_size=5)


def test_other_packings_of_generated_text(words, model, start):
    rows = draw(start, words, model, nsamples=6, pack="pad")
    assert rows.nsamples == 6
    windows = draw(start + "&max_new_tokens=30", words, model, nsamples=6, pack="longdoc")
    assert [len(ids) for ids in windows.sequences] == [8] * 6


def test_prefixes_are_the_first_ids_in_a_seeded_order(words):
    texts = numbered(20, 6)
    prefixes = cut_prefixes(texts, words, 2, 0, 63)
    assert sorted(map(tuple, prefixes)) == sorted((3 + i, 4 + i) for i in range(20))
    assert prefixes != cut_prefixes(texts, words, 2, 1, 63)
    started = cut_prefixes(texts, word_tokenizer(start_token=True), 2, 0, 63)
    assert all(prefix[0] == 1 for prefix in started)
    assert cut_prefixes(["w1", "w1 w2 w3"], words, 2, 0, 63) == [[4, 5]]


def test_built_in_openings_are_many_and_varied(stories):
    texts = openings.read_openings(None)
    assert len(texts) >= 200
    assert len(set(texts)) == len(texts)
    assert len({tuple(text.split()[:2]) for text in texts}) >= 200
    assert all(text.endswith(".") and 4 <= len(text.split()) <= 20 for text in texts)


def test_openings_from_other_files(tmp_path):
    assert openings.read_openings(str(write_jsonl(tmp_path / "a.jsonl", ["x y", " "]))) == ["x y"]
    (tmp_path / "a.txt").write_text("one\n\n two \nthree\n\n\n\nfour")
    assert openings.read_openings(str(tmp_path / "a.txt")) == ["one", "two", "three", "four"]
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match="one text a line"):
        openings.openings_file(str(tmp_path / "a.csv"))


TWO = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import draw, tiny_model, word_tokenizer
from lm_calib_plugin.calibration.sources.self_generated import SelfGenerated

generate = SelfGenerated._generate


def logged(*arguments):
    with open(sys.argv[3], "a") as log:
        log.write("generated\\n")
    return generate(*arguments)


SelfGenerated._generate = logged
print(draw("self?prefixes=" + sys.argv[2], word_tokenizer(), tiny_model(), model_id="m",
           nsamples=40).calib_id)
"""


def test_two_processes_write_once(tmp_path):
    path = tmp_path / "openings.txt"
    path.write_text("\n".join(numbered(9, 5)))
    log = tmp_path / "log.txt"
    here = Path(__file__).parent
    arguments = [sys.executable, "-c", TWO, str(here), str(path), str(log)]
    environment = os.environ | {"PYTHONPATH": str(here.parents[1])}
    running = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    printed = [process.communicate()[0].split()[-1] for process in running]
    assert printed[0] == printed[1]
    assert log.read_text() == "generated\n"
    (kept,) = cache_files()
    body = kept.read_text()
    again = draw(f"self?prefixes={path}", word_tokenizer(), tiny_model(), model_id="m", nsamples=40)
    assert again.calib_id == printed[0]
    assert kept.read_text() == body


@pytest.mark.skipif(not STORIES.is_dir(), reason="the trained model is not here")
def test_a_trained_model_writes_likely_text(stories):
    drawn = draw("self", stories.tokenizer, stories.model, nsamples=4, seqlen=64, vocab_size=512)
    facts = drawn.sources[0]["generation"]
    assert facts["perplexity"]["highest_kept"] < 10
    assert SelfFromPrefix.default_pack == drawn.sources[0]["pack"]
    text = stories.tokenizer.decode(drawn.sequences[0])
    assert sum(word in text for word in (" the ", " was ", " to ", " and ")) >= 2
