"""A killed run goes on where it was, and ends with the file of an uninterrupted one."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import draw, numbered, tiny_model, word_tokenizer

from lm_calib_plugin.calibration import writer
from lm_calib_plugin.calibration.journal import Batch, Journal
from lm_calib_plugin.calibration.text_cache import Written
from lm_calib_plugin.storage import cache_dir

TIMINGS = ("seconds", "tokens_per_second", "scoring_seconds")


class Killed(BaseException):
    """Stands for a signal: nothing in the package catches it."""


def batch(first, count=2):
    texts = [
        Written(f"t{i} \u2028\u00e9", i, True, 1.5 + i, ids=(1, i))
        for i in range(first, first + count)
    ]
    return Batch(first, count, 7, 0.25, 0.125, texts)


def files(suffix):
    return sorted((cache_dir() / "self-generated").glob(f"*{suffix}"))


def without_timings(path):
    head, _, body = path.read_text().partition("\n")
    header = json.loads(head)
    for name in TIMINGS:
        header["statistics"].pop(name)
    header.pop("digest")  # goes over the timings too
    return header, body


def test_batches_come_back_as_they_were(tmp_path):
    path = tmp_path / "a.partial"
    journal = Journal(path, {"seed": 1})
    for first in (0, 2, 4):
        journal.add(batch(first))
    assert Journal(path, {"seed": 1}).batches == {first: batch(first) for first in (0, 2, 4)}
    assert Journal(None, {}).batches == {}
    journal.remove()
    assert not path.exists()


@pytest.mark.parametrize("cut", [1, 5, 60, "flip", "swap", "noise"])
def test_a_line_that_is_torn_or_damaged_ends_the_reading(tmp_path, cut):
    path = tmp_path / "a.partial"
    journal = Journal(path, {})
    for first in (0, 2, 4):
        journal.add(batch(first))
    lines = path.read_bytes().splitlines(keepends=True)
    last = lines[2]
    if cut == "flip":
        last = last.replace(b'"tokens":7', b'"tokens":8')
    elif cut == "swap":
        lines[1], last = last, lines[1]
    elif cut == "noise":
        last = b"\xff\n"
    else:
        last = last[:-cut]
    path.write_bytes(lines[0] + lines[1] + last)
    again = Journal(path, {})
    kept = [0] if cut == "swap" else [0, 2]
    assert sorted(again.batches) == kept
    assert path.read_bytes() == b"".join(lines[:1] if cut == "swap" else lines[:2])
    again.add(batch(2 * len(kept)))
    assert sorted(Journal(path, {}).batches) == [*kept, 2 * len(kept)]


def test_a_journal_of_other_settings_is_not_read(tmp_path):
    path = tmp_path / "a.partial"
    Journal(path, {"seed": 1}).add(batch(0))
    assert Journal(path, {"seed": 2}).batches == {}


EXPRESSIONS = [
    "self?prefixes={}&batch_size=3&pool=11&repetition=0&max_new_tokens=30",
    "self:bos?batch_size=3",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_ends_with_the_file_of_an_uninterrupted_one(
    tmp_path, monkeypatch, expression, after, torn
):
    openings = tmp_path / "openings.txt"
    openings.write_text("\n".join(numbered(9, 5)))
    expression = expression.format(openings)
    original = writer.write_batch
    arguments = {"model_id": "m", "nsamples": 10, "seqlen": 12}

    def run():
        return draw(expression, word_tokenizer(), tiny_model(), **arguments)

    monkeypatch.setenv("LM_CALIB_CACHE", str(tmp_path / "whole"))
    whole = run()
    (path,) = files(".jsonl")
    wanted = without_timings(path)

    monkeypatch.setenv("LM_CALIB_CACHE", str(tmp_path / "killed"))
    written = []

    def killed(*given, **named):
        if len(written) == after:
            raise Killed
        written.append(len(given[1]))
        return original(*given, **named)

    monkeypatch.setattr(writer, "write_batch", killed)
    with pytest.raises(Killed):
        run()
    assert files(".jsonl") == []
    if torn and after:
        (partial,) = files(".partial")
        partial.write_bytes(partial.read_bytes()[:-9])
    calls = []
    monkeypatch.setattr(writer, "write_batch", lambda *a, **n: calls.append(1) or original(*a, **n))
    resumed = run()
    (path,) = files(".jsonl")
    assert without_timings(path) == wanted
    assert resumed.calib_id == whole.calib_id
    assert len(calls) == 4 - after + (torn and after > 0)
    assert files(".partial") == []


def test_a_batch_that_had_to_shrink_stays_small_after_a_restart(tmp_path, monkeypatch):
    original, sizes, model = writer.write_batch, [], tiny_model()

    def run():
        draw("self:bos?batch_size=8", word_tokenizer(), model, model_id="m", nsamples=9)

    def short_of_memory(*given, **named):
        if len(given[1]) > 4:
            raise torch.OutOfMemoryError
        if sizes:
            raise Killed
        sizes.append(len(given[1]))
        return original(*given, **named)

    monkeypatch.setattr(writer, "write_batch", short_of_memory)
    with pytest.raises(Killed):
        run()

    def noted(*given, **named):
        sizes.append(len(given[1]))
        return original(*given, **named)

    monkeypatch.setattr(writer, "write_batch", noted)
    run()
    assert sizes == [4, 4, 1]
