from __future__ import annotations

import itertools

import pytest
from conftest import WORDS, context, draw, numbered, word_tokenizer, write_jsonl

from lm_calib_plugin.calibration import Document
from lm_calib_plugin.calibration.packers import (
    Concatenate,
    InContext,
    LongDocument,
    Pad,
    SeveralLengths,
    base,
    concat,
    longdoc,
    multilen,
)
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
    monkeypatch.setattr(longdoc, "encode", lambda t, text: seen.append(text) or encode(t, text))
    LongDocument().pack(iter(documents(numbered(1000, 20))), context(words), "")
    assert len(seen) == 4


def test_longdoc_too_few_says_how_many_and_what_to_do(words):
    with pytest.raises(UserError) as error:
        LongDocument().pack(iter(documents(numbered(3, 20))), context(words), "")
    assert "found 3 windows of 8 tokens in 3 documents, recipe asks 4" in str(error.value)
    assert "pack=concat" in str(error.value)


def test_longdoc_ends_on_an_endless_stream_of_short_texts(words, monkeypatch):
    monkeypatch.setattr(base, "PATIENCE", 50)

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
    monkeypatch.setattr(concat, "POOL_TOKENS", 10)
    monkeypatch.setattr(concat, "BATCH", 100)
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
    for packer in (LongDocument(), Concatenate(), SeveralLengths()):
        packed = packer.pack(iter(documents(numbered(8, 20))), context(tokenizer), " ")
        assert not any(tokenizer.bos_token_id in ids for ids in packed.sequences)


@pytest.mark.parametrize(
    "packer", [LongDocument(), Concatenate(), Pad(), InContext(), SeveralLengths()]
)
def test_counted_windows_are_the_windows_that_can_be_cut(words, packer):
    texts = ["w1 w2", *numbered(5, 20)]
    found = packer.windows(texts, context(words), " ")
    packed = packer.pack(iter(documents(texts)), context(words, count=found), " ")
    assert len(packed.sequences) == found
    with pytest.raises(UserError):
        packer.pack(iter(documents(texts)), context(words, count=found + 1), " ")


@pytest.mark.parametrize("packer", [LongDocument(), Concatenate(), Pad(), InContext(1)])
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


# --- icl -----------------------------------------------------------------------------------


def test_icl_joins_whole_examples(words):
    texts = [f"w{i} w{i}" for i in range(20)]
    packed = InContext(3).pack(iter(documents(texts)), context(words), "")
    assert packed.indices == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    for ids, numbers in zip(packed.sequences, packed.indices, strict=True):
        assert ids == encode(words, "\n\n".join(texts[i] for i in numbers))
    assert packed.truncated == 0
    assert packed.facts == {"icl_examples": 3, "rows_with_fewer": 0, "empty": 0}


def test_icl_never_cuts_an_example_that_fits_alone(words):
    sizes = [5, 4, 3, 1, 1, 1, 12, 8, 2, 0, 7]
    texts = [" ".join(["w1"] * size) for size in sizes]
    packed = InContext(3).pack(iter(documents(texts)), context(words, count=7), "")
    # Rows of at most 8 tokens and 3 examples; 12 tokens are cut to 8.
    assert packed.indices == [[0], [1, 2, 3], [4, 5], [6], [7], [8], [10]]
    assert [len(ids) for ids in packed.sequences] == [5, 8, 2, 8, 8, 2, 7]
    assert packed.truncated == 1
    assert packed.facts["rows_with_fewer"] == 6
    assert packed.facts["empty"] == 1
    assert packed.documents == 11


def test_icl_rows_begin_as_the_tokenizer_begins():
    tokenizer = word_tokenizer(start_token=True)
    packed = InContext(2).pack(
        iter(documents(["w1", "w2", "w3", "w4"])), context(tokenizer, count=2), ""
    )
    bos = tokenizer.bos_token_id
    assert [ids.count(bos) for ids in packed.sequences] == [1, 1]
    assert all(ids[0] == bos for ids in packed.sequences)


def test_icl_is_an_option_of_the_recipe(words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["w1 w2"] * 30)
    drawn = draw(f"file:{path}", words, pack="icl", icl_examples=2)
    assert [len(ids) for ids in drawn.sequences] == [4] * 4
    assert drawn.sources[0]["icl_examples"] == 2
    assert [len(ids) for ids in draw(f"file:{path}", words, pack="icl").sequences] == [8] * 4


# --- multilen ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seqlen", "expected"),
    [
        (2048, [256, 512, 1024, 2048]),
        (9000, [256, 512, 1024, 2048]),
        (1500, [256, 512, 1024]),
        (512, [256, 512]),
        (400, [50, 100, 200, 400]),
        (8, [1, 2, 4, 8]),
        (2, [1, 2]),
        (1, [1]),
    ],
)
def test_lengths_of_multilen(seqlen, expected):
    assert multilen.lengths(seqlen) == expected


@pytest.mark.parametrize("count", [1, 4, 15, 30, 128])
def test_each_length_has_about_as_many_tokens(count):
    parts = multilen.numbers(count, 2048)
    assert sum(parts.values()) == count
    if count % 15 == 0:
        assert len({length * number for length, number in parts.items()}) == 1
    for length, number in parts.items():
        assert abs(number - count * (2048 / length) / 15) < 1


def test_multilen_windows_do_not_overlap_and_every_sequence_counts_alike(words):
    texts = numbered(40, 7)
    packed = SeveralLengths().pack(iter(documents(texts)), context(words, count=30), " ")
    joined = encode(words, " ".join(texts))
    spans = sorted(
        (start, start + len(ids))
        for ids, start in zip(packed.sequences, packed.indices, strict=True)
    )
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    for ids, start in zip(packed.sequences, packed.indices, strict=True):
        assert ids == joined[start : start + len(ids)]
    assert packed.facts["lengths"] == {"1": 16, "2": 8, "4": 4, "8": 2}
    masses = [w * len(ids) for w, ids in zip(packed.weights, packed.sequences, strict=True)]
    assert masses == pytest.approx([masses[0]] * 30)
    assert sum(masses) == pytest.approx(sum(map(len, packed.sequences)))


def test_multilen_uses_the_last_token_it_is_given(words):
    parts = multilen.numbers(5, 8)
    needed = sum(length * number for length, number in parts.items())
    texts = numbered(1, needed)
    packed = SeveralLengths().pack(iter(documents(texts)), context(words, count=5), " ")
    assert sum(map(len, packed.sequences)) == needed
    with pytest.raises(UserError, match="recipe asks 5"):
        SeveralLengths().pack(
            iter(documents(numbered(1, needed - 1))), context(words, count=5), " "
        )


def test_weights_of_multilen_reach_the_set(words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbered(60, 20))
    drawn = draw(f"file:{path}", words, pack="multilen", nsamples=15)
    masses = {round(w * len(ids), 9) for w, ids in zip(drawn.weights, drawn.sequences, strict=True)}
    assert len(masses) == 1
    chosen = draw(f"file:{path}", words, pack="multilen", nsamples=5, select="zip", pool=15)
    counted = sum(w * len(ids) for w, ids in zip(chosen.weights, chosen.sequences, strict=True))
    assert counted == pytest.approx(chosen.tokens)
    mixed = draw(f"file:{path}+random", words, pack="multilen", nsamples=8)
    rows = mixed.sources[1]["rows"]
    assert [mixed.weights[row] for row in rows] == [1.0] * 4
