from __future__ import annotations

import pytest
import torch
from conftest import draw, numbered, tiny_model, word_tokenizer, write_jsonl
from transformers import LlamaConfig

from lm_calib_plugin.calibration import CalibrationSet, build_calibration, validate_calibration
from lm_calib_plugin.checks import sequence_length
from lm_calib_plugin.compression import compress
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime


@pytest.fixture
def texts(tmp_path):
    return f"file:{write_jsonl(tmp_path / 'texts.jsonl', numbered(40, 12))}"


@pytest.fixture
def stored(words, texts, tmp_path):
    made = draw(texts, words, nsamples=6, pack="pad", calib_seed=3)
    made.save(tmp_path / "set", tokenizer=words, vocab_size=len(words))
    return made


def ids(drawn):
    return [s.tolist() for s in drawn.sequences]


def whole(words, expression, *, seqlen=8, **fields):
    """Without ``nsamples``, which ``draw`` always gives."""
    recipe = Recipe(method="wanda", sparsity=0.5, calibration=expression, **fields)
    return build_calibration(
        recipe, words, seqlen=seqlen, model_id="", vocab_size=fields.get("vocab", len(words))
    )


def test_a_whole_set_is_the_set_that_was_built(words, stored, tmp_path):
    again = whole(words, f"set:{tmp_path / 'set'}")
    assert again.calib_id == stored.calib_id
    assert ids(again) == ids(stored)
    assert (again.seqlen, again.seed) == (stored.seqlen, 3)
    (record,) = again.sources
    origin = {"folder": str(tmp_path / "set"), "calib_id": stored.calib_id}
    assert record == stored.sources[0] | {"from_set": origin}


def test_the_first_n(words, stored, tmp_path):
    expression = f"set:{tmp_path / 'set'}"
    some = whole(words, expression, nsamples=2)
    assert ids(some) == ids(stored)[:2]
    assert (
        some.calib_id == CalibrationSet.of(ids(some), seqlen=8, tokenizer=some.tokenizer).calib_id
    )
    assert some.sources[0]["indices"] == stored.sources[0]["indices"][:2]
    assert some.sources[0]["rows"] == [0, 1]
    assert some.sources[0]["nsequences"] == 2
    assert whole(words, expression, nsamples=6).calib_id == stored.calib_id
    with pytest.raises(UserError, match="holds 6 sequences, recipe asks 7; at most 6"):
        whole(words, expression, nsamples=7)


def test_the_default_number_of_samples_is_not_a_wish(stored, tmp_path):
    expression = f"set:{tmp_path / 'set'}"
    recipe = Recipe(method="wanda", sparsity=0.5, calibration=expression)
    assert isinstance(recipe.nsamples, int)
    assert not recipe.nsamples_given
    assert "nsamples" not in recipe.to_metadata()
    validate_calibration(recipe)
    asked = Recipe(method="wanda", sparsity=0.5, calibration=expression, nsamples=128)
    with pytest.raises(UserError, match="recipe asks 128"):
        validate_calibration(asked)
    again = Recipe(**recipe.to_metadata())
    assert not again.nsamples_given
    plain = Recipe(method="wanda", sparsity=0.5, calibration="self")
    assert plain.to_metadata()["nsamples"] == 128


def test_a_share_of_a_mix(words, stored, texts, tmp_path):
    mixed = f"set:{tmp_path / 'set'}*0.5+{texts}*0.5"
    first = draw(mixed, words, nsamples=8, pack="pad")
    record = first.sources[0]
    assert record["nsequences"] == 4
    assert len(set(record["drawn"])) == 4
    mine = [first.sequences[row].tolist() for row in record["rows"]]
    assert mine == [ids(stored)[row] for row in record["drawn"]]
    assert record["set"]["calib_id"] == stored.calib_id
    assert record["set"]["sources"][0]["source"] == texts
    assert draw(mixed, words, nsamples=8, pack="pad").calib_id == first.calib_id
    drawn = {
        tuple(draw(mixed, words, nsamples=8, pack="pad", calib_seed=seed).sources[0]["drawn"])
        for seed in range(5)
    }
    assert len(drawn) > 1
    recipe = Recipe(method="wanda", sparsity=0.5, calibration=mixed, nsamples=14)
    with pytest.raises(UserError, match="holds 6 sequences, recipe asks 7"):
        validate_calibration(recipe)


def test_weights_come_along(words, texts, tmp_path):
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    base = draw(texts, words, nsamples=6, pack="pad")
    weighted = CalibrationSet.of(
        base.sequences, seqlen=8, tokenizer=base.tokenizer, weights=weights
    )
    weighted.save(tmp_path / "w")
    assert whole(words, f"set:{tmp_path / 'w'}").calib_id == weighted.calib_id
    assert whole(words, f"set:{tmp_path / 'w'}", nsamples=2).weights == (1, 2)
    mixed = draw(f"set:{tmp_path / 'w'}+{texts}", words, nsamples=8, pack="pad")
    first, second = mixed.sources
    drawn = [weights[row] for row in first["drawn"]]
    expected = [w / (sum(drawn) / 4) for w in drawn]
    assert [mixed.weights[row] for row in first["rows"]] == pytest.approx(expected)
    assert {mixed.weights[row] for row in second["rows"]} == {1.0}


def test_another_tokenizer_is_refused_with_both_digests(stored, tmp_path):
    other = word_tokenizer(start_token=True)
    for expression in (f"set:{tmp_path / 'set'}", f"set:{tmp_path / 'set'}*0.5+random*0.5"):
        with pytest.raises(UserError) as caught:
            draw(expression, other)
        text = str(caught.value)
        assert stored.tokenizer in text
        assert "lm-calib calibrate" in text
        assert "--pretrained" in text


def test_ids_beyond_the_vocabulary_are_refused(words, stored, tmp_path):
    with pytest.raises(UserError, match=r"token id \d+; the model has 4 rows"):
        draw(f"set:{tmp_path / 'set'}", words, vocab_size=4)


def test_a_set_is_never_cut(words, stored, tmp_path):
    config = tiny_model().config
    expression = f"set:{tmp_path / 'set'}"

    def recipe(**fields):
        return Recipe(method="wanda", sparsity=0.5, calibration=expression, **fields)

    assert sequence_length(recipe(), config) == 8
    assert sequence_length(recipe(seqlen=20), config) == 20
    with pytest.raises(UserError, match="sequences of 8 tokens, seqlen is 7; .* seqlen>=8"):
        sequence_length(recipe(seqlen=7), config)
    with pytest.raises(UserError, match="seqlen is 7"):
        draw(expression, words, seqlen=7)
    config.max_position_embeddings = 6
    with pytest.raises(UserError, match="what the model accepts is 6"):
        sequence_length(recipe(), config)


@pytest.mark.parametrize("expression", ["{}", "null:shuffle({})", "cross({}+random)"])
def test_a_set_gives_its_length_wherever_it_stands(expression, words, stored, tmp_path):
    recipe = Recipe(
        method="wanda", sparsity=0.5, calibration=expression.format(f"set:{tmp_path / 'set'}")
    )
    config = LlamaConfig(max_position_embeddings=64)
    assert sequence_length(recipe, config) == stored.seqlen


def test_what_is_wrong_shows_before_a_model_is_loaded(stored, tmp_path):
    def validate(expression):
        validate_calibration(Recipe(method="wanda", sparsity=0.5, calibration=expression))

    with pytest.raises(UserError, match="`set` needs a folder"):
        validate("set")
    with pytest.raises(UserError, match="no folder"):
        validate(f"set:{tmp_path / 'none'}")
    with pytest.raises(UserError, match="no option"):
        validate(f"set:{tmp_path / 'set'}?n=3")
    file = tmp_path / "set" / "tokens.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CalibError, match=r"tokens\.safetensors: damaged: expected sha256"):
        validate(f"set:{tmp_path / 'set'}*0.5+self*0.5")


def test_a_set_of_sets(words, stored, texts, tmp_path):
    mixed = draw(f"set:{tmp_path / 'set'}+{texts}", words, nsamples=4, pack="pad")
    mixed.save(tmp_path / "mixed", tokenizer=words)
    again = whole(words, f"set:{tmp_path / 'mixed'}")
    assert again.calib_id == mixed.calib_id
    card = (tmp_path / "mixed" / "README.md").read_text()
    assert card.count(f"- {texts}: not known") == 2
    assert all(torch.equal(a, b) for a, b in zip(again.sequences, mixed.sequences, strict=True))


def test_a_set_has_the_fold_and_packing_it_was_built_with(words, texts, tmp_path):
    fold = draw(texts, words, nsamples=2, pack="pad", fold="judge")
    fold.save(tmp_path / "judge")
    expression = f"set:{tmp_path / 'judge'}"

    def validate(calibration=expression, **fields):
        validate_calibration(
            Recipe(method="wanda", sparsity=0.5, calibration=calibration, **fields)
        )

    validate(fold="judge", pack="pad")
    with pytest.raises(
        UserError, match="got 'choose', .* was built with 'judge'; .* --fold choose"
    ):
        validate(fold="choose")
    with pytest.raises(UserError, match="was built with 'judge'"):
        validate(f"{expression}+random", fold="choose", nsamples=2)
    for inside in (f"null:shuffle({expression})", f"cross({expression}+random)"):
        with pytest.raises(UserError, match="got 'choose', .* was built with 'judge'"):
            validate(inside, fold="choose", nsamples=2)
        validate(inside, fold="judge", nsamples=2)
    with pytest.raises(UserError, match="holds 2 sequences, recipe asks 3"):
        validate(f"null:unigram({expression})", nsamples=3)
    with pytest.raises(UserError, match="got 'concat', .* was built with 'pad'"):
        validate(pack="concat")
    validate(f"{expression}+random", pack="concat", nsamples=2)


def test_a_seed_that_draws_nothing_is_noted(words, stored, tmp_path):
    expression = f"set:{tmp_path / 'set'}"
    assert "warnings" not in whole(words, expression, calib_seed=3).sources[0]
    noted = whole(words, expression, calib_seed=5)
    assert noted.calib_id == stored.calib_id
    assert noted.sources[0]["warnings"] == [
        "calib_seed=5 draws nothing from a set that is used whole"
    ]


def test_a_set_given_to_compress_must_fit_the_tokenizer(words, stored, tmp_path):
    recipe = Recipe(method="wanda", sparsity=0.5)
    runtime = Runtime(progress=False, report_dir=str(tmp_path / "reports"))
    loaded = CalibrationSet.load(tmp_path / "set")
    with pytest.raises(UserError, match=f"made with tokenizer {stored.tokenizer}, this model has"):
        compress(tiny_model(), word_tokenizer(start_token=True), recipe, runtime, loaded)
    report = compress(tiny_model(), words, recipe, runtime, loaded)
    assert report.calibration["calib_id"] == stored.calib_id
    assert report.recipe["calibration"] == "given"
    assert report.calibration_set is loaded


def test_a_set_is_a_pool_to_select_from(words, stored, tmp_path):
    expression = f"set:{tmp_path / 'set'}"
    chosen = draw(expression, words, nsamples=2, select="zip", pool=6)
    assert chosen.nsamples == 2
    assert all(row in ids(stored) for row in ids(chosen))
    assert chosen.sources[0]["selection"]["pool"] == 6
    with pytest.raises(UserError, match="pool: .* holds 6 sequences, recipe asks 16; .*lower pool"):
        draw(expression, words, nsamples=2, select="zip", pool=16)


def test_licenses_of_inner_sources_are_named(words, stored, texts, tmp_path):
    shuffled = draw(f"null:shuffle(set:{tmp_path / 'set'})", words, nsamples=4)
    shuffled.save(tmp_path / "shuffled", tokenizer=words)
    assert f"- {texts}: not known" in (tmp_path / "shuffled" / "README.md").read_text()
