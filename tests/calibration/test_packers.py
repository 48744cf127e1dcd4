from __future__ import annotations

import pytest
from conftest import WORDS, context, numbered, word_tokenizer

from lm_calib_plugin.calibration import Document, packers
from lm_calib_plugin.calibration.packers import Concatenate, LongDocument, Pad
from lm_calib_plugin.calibration.tokens import encode
from lm_calib_plugin.errors import UserError


def documents(texts):
    return [Document(i, text) for i, text in enumerate(texts)]


def test_longdoc_takes_one_window_inside_each_document(words):
    texts = numbered(6, 20)
    packed = LongDocument().pack(iter(documents(texts)), context(words), "\n\n")
    assert len(packed.sequences) == len(packed.indices) == 4
    for ids, (document, start) in zip(packed.sequences, packed.indices, strict=True):
        assert ids == encode(words, texts[document])[start : start + 8]
    assert packed.documents == 4
    assert packed.truncated == 4


def test_longdoc_skips_documents_that_are_not_longer_than_seqlen(words):
    texts = [*numbered(3, 8), *numbered(4, 9)]
    packed = LongDocument().pack(iter(documents(texts)), context(words), "")
    assert [document for document, _ in packed.indices] == [3, 4, 5, 6]
    assert {start for _, start in packed.indices} <= {0, 1}


def test_longdoc_window_starts_cover_the_document(words):
    starts = set()
    for seed in range(60):
        packed = LongDocument().pack(
            iter(documents(numbered(1, 11))), context(words, count=1, seed=seed), ""
        )
        starts.add(packed.indices[0][1])
    assert starts == {0, 1, 2, 3}


def test_longdoc_tokenizes_no_more_than_needed(words, monkeypatch):
    seen = []
    monkeypatch.setattr(packers, "encode", lambda t, text: seen.append(text) or encode(t, text))
    LongDocument().pack(iter(documents(numbered(1000, 20))), context(words), "")
    assert len(seen) == 4


def test_longdoc_too_few_says_how_many_and_what_to_do(words):
    with pytest.raises(UserError) as error:
        LongDocument().pack(iter(documents(numbered(3, 20))), context(words), "")
    assert "found 3 windows of 8 tokens in 3 documents, recipe asks 4" in str(error.value)
    assert "pack=concat" in str(error.value)


def test_longdoc_ends_on_an_endless_stream_of_short_texts(words, monkeypatch):
    monkeypatch.setattr(packers, "PATIENCE", 50)

    def endless():
        number = 0
        while True:
            yield Document(number, "w1 w2")
            number += 1

    with pytest.raises(UserError, match="found 0 windows of 8 tokens in 50 documents"):
        LongDocument().pack(endless(), context(words), "")
    with pytest.raises(UserError, match="in 50 documents"):
        Pad().pack((Document(0, " ") for _ in iter(int, 1)), context(words), "")


def test_concat_windows_are_consecutive_and_do_not_overlap(words):
    texts = numbered(10, 7)
    packed = Concatenate().pack(iter(documents(texts)), context(words, count=8), "\n\n")
    joined = encode(words, "\n\n".join(texts))
    assert sorted(packed.indices) == [0, 8, 16, 24, 32, 40, 48, 56]
    for ids, start in zip(packed.sequences, packed.indices, strict=True):
        assert ids == joined[start : start + 8]
    assert packed.facts == {"windows": 8, "read_whole": True}


def test_concat_reads_a_huge_source_up_to_a_bound(words, monkeypatch):
    monkeypatch.setattr(packers, "POOL_TOKENS", 10)
    monkeypatch.setattr(packers, "BATCH", 100)
    source = (Document(i, " ".join(WORDS)) for i in range(1000))
    packed = Concatenate().pack(source, context(words), " ")
    assert packed.documents == 5  # 300 tokens: eight times the 32 that are asked for
    assert packed.facts["read_whole"] is False


def test_concat_too_little_text(words):
    with pytest.raises(UserError, match=r"found 1 windows of 8 tokens .* recipe asks 4"):
        Concatenate().pack(iter(documents(numbered(3, 5))), context(words), " ")


def test_pad_keeps_short_rows_short_and_cuts_long_ones():
    tokenizer = word_tokenizer(start_token=True)
    texts = ["w1 w2", "", "  ", *numbered(3, 20)]
    packed = Pad().pack(iter(documents(texts)), context(tokenizer), "")
    assert packed.indices == [0, 3, 4, 5]
    assert [len(ids) for ids in packed.sequences] == [3, 8, 8, 8]
    assert all(ids[0] == tokenizer.bos_token_id for ids in packed.sequences)
    assert packed.truncated == 3
    assert packed.facts == {"empty": 2}


def test_windows_of_longdoc_and_concat_hold_no_special_token():
    tokenizer = word_tokenizer(start_token=True)
    for packer in (LongDocument(), Concatenate()):
        packed = packer.pack(iter(documents(numbered(8, 20))), context(tokenizer), " ")
        assert not any(tokenizer.bos_token_id in ids for ids in packed.sequences)


@pytest.mark.parametrize("packer", [LongDocument(), Concatenate(), Pad()])
def test_counted_windows_are_the_windows_that_can_be_cut(words, packer):
    texts = ["w1 w2", *numbered(5, 20)]
    found = packer.windows(texts, context(words), " ")
    packed = packer.pack(iter(documents(texts)), context(words, count=found), " ")
    assert len(packed.sequences) == found
    with pytest.raises(UserError):
        packer.pack(iter(documents(texts)), context(words, count=found + 1), " ")


@pytest.mark.parametrize("packer", [LongDocument(), Concatenate(), Pad()])
def test_a_smaller_draw_is_the_beginning_of_a_larger_one(words, packer):
    texts = numbered(12, 20)
    small = packer.pack(iter(documents(texts)), context(words, count=3), " ")
    large = packer.pack(iter(documents(texts)), context(words, count=9), " ")
    assert large.sequences[:3] == small.sequences


def test_joining_in_pieces_gives_the_same_ids(words, monkeypatch):
    from lm_calib_plugin.calibration import tokens

    texts = numbered(20, 7)
    whole = tokens.encode_joined(words, texts, " ")
    monkeypatch.setattr(tokens, "PIECE", 30)
    assert tokens.encode_joined(words, texts, " ") == whole == encode(words, " ".join(texts))
