from __future__ import annotations

import random

import pytest

from lm_calib_plugin.calibration.contamination import ContaminationIndex, words

ALPHABET = [f"w{i}" for i in range(4)]


def brute(calibration, text):
    """Places of the text whose 13 words (all of it, if it has 5 to 12) stand in a sequence."""
    size = min(13, len(text))
    if size < 5:
        return []
    held = {tuple(c[i : i + size]) for c in calibration for i in range(len(c) - size + 1)}
    return [
        " ".join(text[i : i + size])
        for i in range(len(text) - size + 1)
        if tuple(text[i : i + size]) in held
    ]


@pytest.mark.parametrize("seed", range(40))
def test_overlaps_are_those_of_a_plain_search(seed):
    rng = random.Random(seed)
    calibration = [rng.choices(ALPHABET, k=rng.randrange(60)) for _ in range(rng.randrange(1, 6))]
    texts = [rng.choices(ALPHABET, k=rng.randrange(30)) for _ in range(20)]
    source = max(calibration, key=len)
    for length in (3, 5, 9, 12, 13, 14, 20):
        start = rng.randrange(max(1, len(source) - length))
        texts.append(rng.choices(ALPHABET, k=2 * (length > 12)) + source[start : start + length])
    index = ContaminationIndex([" ".join(c) for c in calibration])
    for text in texts:
        found = list(index.overlaps(text))
        assert [o.words for o in found] == brute(calibration, text)
        for overlap in found:
            inside = " ".join(calibration[overlap.sequence])
            assert f" {overlap.words} " in f" {inside} "
            assert overlap.kind == ("13-gram" if len(text) >= 13 else "whole text")


def test_nothing_spans_two_sequences():
    text = [f"w{i}" for i in range(16)]
    halves = [" ".join(text[:8]), " ".join(text[8:])]
    assert ContaminationIndex(halves).find(text) is None
    assert ContaminationIndex([" ".join(text)]).find(text) is not None


def test_words_forget_case_punctuation_and_width():
    assert words("Don't  STOP, the\nﬁre—now!") == ["dont", "stop", "the", "firenow"]
    assert words("Straße") == words("STRASSE")
    assert words("ＡＢＣ１２ snake_case") == ["abc12", "snakecase"]
    assert words("...") == words("") == []


def test_scripts_without_spaces_are_compared_by_character():
    text = "今天天气很好我们一起去公园散步吧"
    assert len(words(text)) == len(text)
    index = ContaminationIndex([f"前文。{text}，后文。"])
    assert index.find(words(text[:13])).kind == "13-gram"


def test_within_counts_only_what_both_hold():
    text = [f"w{i}" for i in range(20)]
    index = ContaminationIndex([" ".join(text[:15])])
    assert index.find(text, within=ContaminationIndex([" ".join(text[2:])])).words.startswith("w2")
    assert index.find(text, within=ContaminationIndex([" ".join(text[3:])])) is None
    assert index.find(text, within=ContaminationIndex([])) is None


def test_an_empty_calibration_text_overlaps_with_nothing():
    assert ContaminationIndex([""]).find([f"w{i}" for i in range(20)]) is None
