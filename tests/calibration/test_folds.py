from __future__ import annotations

import hashlib

import pytest
from conftest import draw, numbered, write_jsonl

from lm_calib_plugin.calibration.folds import SHARES, FoldFilter, fold_of, fold_seed, in_fold
from lm_calib_plugin.calibration.sources.base import Document
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import FOLDS

PARTS = FOLDS[1:]


def texts(count, length=20):
    """Texts that differ from each other in more than their place in a cycle."""
    return [f"w{i % 60} w{i // 60 % 60} {rest}" for i, rest in enumerate(numbered(count, length))]


def test_folds_are_those_of_the_recipe_and_whole():
    assert tuple(SHARES) == PARTS
    assert sum(SHARES.values()) == 100


def test_fold_is_a_place_on_the_number_line_of_the_hash():
    for text in texts(50):
        hashed = hashlib.sha256(text.encode()).hexdigest()
        place = int(hashed[:16], 16) / 2**64
        assert fold_of(text) == (
            "choose" if place < 0.6 else "validate" if place < 0.8 else "judge"
        )


def test_shares_are_those_promised():
    found = [fold_of(f"document {i}") for i in range(5000)]
    for fold, share in SHARES.items():
        expected = share / 100
        # Four standard deviations of a binomial share.
        assert (
            abs(found.count(fold) / 5000 - expected) < 4 * (expected * (1 - expected) / 5000) ** 0.5
        )


@pytest.mark.parametrize(
    "copy", ["A text\nof  Two lines ", "a TEXT of two lines", "\ta text of two\u00a0lines"]
)
def test_a_reformatted_copy_is_in_the_same_fold(copy):
    assert fold_of(copy) == fold_of("a text of two lines")


def test_text_that_is_no_unicode_has_a_fold():
    assert fold_of("\ud800") in PARTS
    assert fold_of("") == fold_of(" \n") in PARTS


def test_every_document_is_in_one_fold_and_in_all():
    for text in texts(30):
        assert [in_fold(text, fold) for fold in PARTS].count(True) == 1
        assert in_fold(text, "all")


def test_filter_keeps_order_and_counts():
    documents = [Document(i, text) for i, text in enumerate(texts(60))]
    kept = []
    for fold in PARTS:
        passing = FoldFilter(fold)
        found = list(passing(documents))
        assert [d.number for d in found] == sorted(d.number for d in found)
        assert passing.left_out == 60 - len(found)
        kept += found
    assert sorted(kept) == documents


@pytest.mark.parametrize("pack", ["longdoc", "concat", "pad"])
def test_sets_of_two_folds_share_no_document(words, tmp_path, pack):
    path = write_jsonl(tmp_path / "a.jsonl", texts(200))
    every = draw(f"file:{path}", words, pack=pack)
    record = every.sources[0]
    assert (record["fold"], record["left_out"]) == ("all", 0)
    seen = set()
    for fold in PARTS:
        drawn = draw(f"file:{path}", words, pack=pack, fold=fold)
        record = drawn.sources[0]
        assert record["fold"] == fold
        assert record["left_out"] > 0
        if pack == "pad":
            assert all(fold_of(texts(200)[number]) == fold for number in record["indices"])
            assert not seen & set(record["indices"])
            seen |= set(record["indices"])
        else:
            assert drawn.calib_id != every.calib_id
        if pack == "concat":
            assert record["documents"] + record["left_out"] == 200


def test_fold_of_a_draw_does_not_depend_on_the_seed(words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(100))
    for seed in range(3):
        drawn = draw(f"file:{path}", words, pack="pad", fold="judge", calib_seed=seed)
        assert {fold_of(texts(100)[i]) for i in drawn.sources[0]["indices"]} == {"judge"}


def test_ids_without_documents_differ_between_folds(words):
    names = {draw("random", words, fold=fold).calib_id for fold in FOLDS}
    assert len(names) == len(FOLDS)
    assert draw("random", words).calib_id == draw("random", words, fold="all").calib_id
    assert fold_seed(5, "all") == 5


def test_the_model_writes_other_text_for_every_fold(stories):
    drawn = {
        fold: draw(
            "self?prefix_tokens=1&batch_size=16&dedup=0",
            stories.tokenizer,
            stories.model,
            fold=fold,
            nsamples=6,
            vocab_size=stories.model.config.vocab_size,
            model_id="m",
        )
        for fold in ("all", "judge", "validate")
    }
    assert all(len(d.sequences) == 6 for d in drawn.values())
    # No text is thrown away: the fold is in the seed.
    assert all(d.sources[0]["left_out"] == 0 for d in drawn.values())
    assert {d.sources[0]["fold"] for d in drawn.values()} == set(drawn)
    # This model begins all its stories alike, so seeds are compared rather than texts.
    assert len({d.sources[0]["settings"]["seed"] for d in drawn.values()}) == 3


def test_a_fold_that_is_too_small_is_named(words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(10))
    judged = [text for text in texts(10) if fold_of(text) == "judge"]
    with pytest.raises(UserError) as caught:
        draw(f"file:{path}", words, pack="pad", fold="judge", nsamples=9)
    assert (
        f"found {len(judged)} windows of 8 tokens in {len(judged)} documents of fold `judge`, "
        "recipe asks 9; lower nsamples or seqlen, set fold=all, or" in str(caught.value)
    )
    assert "file:my.txt?split=2000" in str(caught.value)


def test_unknown_fold_names_the_nearest(words):
    with pytest.raises(UserError, match="did you mean `judge`"):
        draw("random", words, fold="juge")
