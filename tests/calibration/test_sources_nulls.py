"""The controls, against plain definitions."""

from __future__ import annotations

from collections import Counter

import pytest
from conftest import draw, numbered, write_jsonl

from lm_calib_plugin.calibration import validate_calibration
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import Recipe

ALL = ["random", "ascii", "ellipsis", "shuffle({})", "unigram({})"]


@pytest.fixture(scope="module")
def characters():
    """A tokenizer with one id for each printable character."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(code): code - 31 for code in range(32, 127)} | {"\n": 96, "<unk>": 0}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def ids(drawn):
    return [sequence.tolist() for sequence in drawn.sequences]


def flat(drawn):
    return [i for sequence in ids(drawn) for i in sequence]


@pytest.fixture
def corpus(tmp_path):
    return f"file:{write_jsonl(tmp_path / 'corpus.jsonl', numbered(40, 20))}"


@pytest.fixture
def uneven(tmp_path):
    texts = [" ".join(["w1"] * (3 + n % 5) + [f"w{n}"]) for n in range(40)]
    return f"file:{write_jsonl(tmp_path / 'uneven.jsonl', texts)}"


@pytest.mark.parametrize("kind", ALL)
def test_a_seed_fixes_the_ids(characters, corpus, kind):
    text = "null:" + kind.format(corpus)
    first, again = (draw(text, characters, calib_seed=3) for _ in range(2))
    assert first.calib_id == again.calib_id
    assert all(len(sequence) == 8 for sequence in first.sequences)
    other = draw(text, characters, calib_seed=4)
    assert (other.calib_id == first.calib_id) == (kind == "ellipsis")


@pytest.mark.parametrize("kind", ALL)
def test_more_sequences_than_one(characters, corpus, kind):
    drawn = ids(draw("null:" + kind.format(corpus), characters, nsamples=5, seqlen=16))
    assert len(drawn) == 5
    assert len({tuple(sequence) for sequence in drawn}) == (1 if kind == "ellipsis" else 5)


def test_random_is_short_for_null_random(words):
    short, long = (draw(text, words, nsamples=6) for text in ("random", "null:random"))
    assert short.calib_id == long.calib_id
    assert short.sources[0]["vocabulary"] == long.sources[0]["vocabulary"]


def test_ellipsis_is_the_tokens_of_dots(characters):
    drawn = draw("null:ellipsis", characters, seqlen=1200)
    assert set(flat(drawn)) == {ord(".") - 31}
    assert drawn.tokens == 4 * 1200


def test_ascii_is_uniform_over_what_is_typed(characters):
    seen = Counter(flat(draw("null:ascii", characters, seqlen=2350)))
    assert seen.keys() == set(range(2, 96))  # everything but the space
    # 94 characters, 100 of each expected: 93 degrees of freedom, 160 is beyond 1 in 50,000.
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 160


@pytest.mark.parametrize("pack", ["concat", "pad"])
def test_shuffle_keeps_tokens_and_lengths_of_the_paired_draw(words, uneven, pack):
    fields = {"nsamples": 12, "pack": pack, "calib_seed": 5}
    real = draw(uneven, words, **fields)
    shuffled = draw(f"null:shuffle({uneven})", words, **fields)
    assert Counter(flat(shuffled)) == Counter(flat(real))
    assert flat(shuffled) != flat(real)
    assert [len(s) for s in shuffled.sequences] == [len(s) for s in real.sequences]
    assert shuffled.sources[0]["inner"][0]["indices"] == real.sources[0]["indices"]


def test_shuffle_permutes_over_all_sequences(words, tmp_path):
    parts = [
        f"file:{write_jsonl(tmp_path / f'{word}.jsonl', [' '.join([word] * 8)] * 9)}"
        for word in ("w1", "w2")
    ]
    shuffled = draw(f"null:shuffle({'+'.join(parts)})", words, nsamples=8, pack="concat")
    assert all(len(set(sequence)) == 2 for sequence in ids(shuffled))


def test_what_stands_inside_may_be_a_mix_and_is_the_draw_of_that_mix(words, corpus, uneven):
    mix = f"{corpus}*0.75+{uneven}*0.25"
    fields = {"nsamples": 8, "pack": "concat"}
    real, shuffled = (draw(text, words, **fields) for text in (mix, f"null:shuffle({mix})"))
    assert Counter(flat(shuffled)) == Counter(flat(real))
    inner = shuffled.sources[0]["inner"]
    assert [record["nsequences"] for record in inner] == [6, 2]
    assert inner == list(real.sources)


def test_pairing_holds_at_every_place_of_a_sum(words, corpus):
    plain = draw(f"random+{corpus}", words, nsamples=8)
    control = draw(f"random+null:unigram({corpus})", words, nsamples=8)
    assert control.sources[1]["inner"][0]["indices"] == plain.sources[1]["indices"]
    assert control.sources[1]["rows"] == plain.sources[1]["rows"]
    nested = draw(f"random+null:shuffle(null:shuffle({corpus}))", words, nsamples=8)
    innermost = nested.sources[1]["inner"][0]["inner"][0]
    assert innermost["indices"] == plain.sources[1]["indices"]


def test_unigram_follows_the_frequencies_of_the_draw(words, uneven):
    fields = {"nsamples": 40, "pack": "concat", "seqlen": 5}
    real = Counter(flat(draw(uneven, words, **fields)))
    control = draw(f"null:unigram({uneven})", words, **fields)
    made = Counter(flat(control))
    total = real.total()
    assert made.total() == total == 200
    assert made.keys() <= real.keys()
    assert made != real
    # w1 against all other tokens: one degree of freedom; 15 is beyond 1 in 9,000.
    (common, often), *_ = real.most_common(1)
    expected = (often, total - often)
    found = (made[common], total - made[common])
    assert sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True)) < 15
    assert [len(s) for s in control.sequences] == [5] * 40


def test_license_notes_of_what_stands_inside_are_kept(words, corpus, monkeypatch):
    from lm_calib_plugin.calibration.sources.files import Files

    provenance = Files.provenance
    monkeypatch.setattr(Files, "provenance", lambda self: provenance(self) | {"licence": "MIT"})
    drawn = draw(f"null:shuffle({corpus}+{corpus})", words)
    assert drawn.sources[0]["licence"] == "MIT"
    summary = drawn.summary()["sources"][0]
    assert [record["licence"] for record in summary["inner"]] == ["MIT", "MIT"]
    assert "indices" not in summary["inner"][0]
    assert "rows" not in summary["inner"][0]


def test_asked_and_rounded_shares_are_recorded(words, corpus):
    drawn = draw(f"{corpus}*0.33+random*0.33+null:ascii*0.33", words, nsamples=4)
    assert [source["weight"] for source in drawn.sources] == [1 / 3] * 3
    assert [source["share"] for source in drawn.sources] == [0.5, 0.25, 0.25]
    assert [source["nsequences"] for source in drawn.sources] == [2, 1, 1]


def test_a_tokenizer_without_punctuation_is_named(words, monkeypatch):
    from lm_calib_plugin.calibration.sources import nulls

    monkeypatch.setattr(nulls, "encode", lambda tokenizer, text: [])
    with pytest.raises(UserError, match="no token for letters and punctuation"):
        draw("null:ascii", words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "needs a kind; null:KIND with one of random, ascii"),
        ("null:suffle(self)", "did you mean `shuffle`"),
        ("null:shuffle", r"needs the source whose tokens it takes; null:shuffle\(c4\)"),
        ("null:random(self)", "made of no other source, got self; .* write null:random"),
        ("null:ascii?chars=3", "no option `chars`"),
        ("null:shuffle(file:/no/such/file.txt)", "no file or folder"),
        ("null:shuffle(null:unigram(self?top_p=7))", "`top_p` of `self`"),
    ],
)
def test_validation_looks_inside(text, message):
    with pytest.raises(UserError, match=message):
        validate_calibration(Recipe(method="wanda", sparsity=0.5, calibration=text))


def test_a_fold_holds_inside_too(words, corpus):
    fields = {"nsamples": 4, "pack": "concat", "fold": "choose"}
    real, shuffled = (draw(t, words, **fields) for t in (corpus, f"null:shuffle({corpus})"))
    assert Counter(flat(shuffled)) == Counter(flat(real))
    assert shuffled.sources[0]["inner"][0]["fold"] == "choose"
