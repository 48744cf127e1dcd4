from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import draw, numbered, tiny_model, write_jsonl

from lm_calib_plugin import registry
from lm_calib_plugin.calibration import (
    Document,
    Option,
    Source,
    build,
    make_source,
    validate_calibration,
)
from lm_calib_plugin.calibration.build import interleaved
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.expression import parse_calibration
from lm_calib_plugin.guard import evaluation_mode, random_state_untouched
from lm_calib_plugin.recipe import Recipe


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", numbered(30, 20))


def test_same_seed_same_set_other_seed_other_set(words, corpus):
    first, again = (draw(f"file:{corpus}", words, calib_seed=3) for _ in range(2))
    assert first.calib_id == again.calib_id
    assert first.sources == again.sources
    assert draw(f"file:{corpus}", words, calib_seed=4).calib_id != first.calib_id


@pytest.mark.parametrize("pack", ["longdoc", "concat", "pad"])
def test_name_of_the_set_does_not_depend_on_the_path(words, corpus, tmp_path, pack):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = write_jsonl(elsewhere / "other.jsonl", numbered(30, 20))
    first = draw(f"file:{corpus}", words, pack=pack)
    second = draw(f"file:{moved}", words, pack=pack)
    assert first.calib_id == second.calib_id
    assert first.sources[0]["fingerprint"] == second.sources[0]["fingerprint"]
    assert first.sources[0]["pack"] == pack


def test_shares_of_a_mix_are_exact_and_interleaved(words, corpus, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", ["w50 w51"] * 40)
    drawn = draw(f"file:{corpus}*0.5+random*0.3+file:{other}*0.2", words, nsamples=10)
    counts = [source["nsequences"] for source in drawn.sources]
    assert counts == [5, 3, 2]
    rows = [row for source in drawn.sources for row in source["rows"]]
    assert sorted(rows) == list(range(10))
    for row in drawn.sources[2]["rows"]:
        assert set(drawn.sequences[row].tolist()) <= {53, 54}
    assert {row // 5 for row in drawn.sources[2]["rows"]} == {0, 1}


def test_every_stretch_of_a_mix_holds_each_source():
    order = [owner for owner, _ in interleaved([6, 3, 1])]
    assert sorted(order) == [0] * 6 + [1] * 3 + [2]
    assert all(1 in order[i : i + 4] for i in range(6))
    assert [place for owner, place in interleaved([6, 3, 1]) if owner == 0] == list(range(6))
    assert interleaved([]) == []


def test_a_source_without_share_is_not_opened(words, corpus, monkeypatch):
    opened = []
    original = build._packed
    monkeypatch.setattr(
        build, "_packed", lambda s, p, c: opened.append(s.argument) or original(s, p, c)
    )
    drawn = draw(f"file:{corpus}*0.99+file:{corpus}?column=text*0.01", words, nsamples=2)
    assert len(opened) == 1
    assert [source["nsequences"] for source in drawn.sources] == [2, 0]


def test_two_terms_of_one_file_draw_differently(words, corpus):
    drawn = draw(f"file:{corpus}+file:{corpus}", words, nsamples=8, pack="concat")
    assert drawn.sources[0]["indices"] != drawn.sources[1]["indices"]


def test_ids_beyond_the_embedding_are_refused(words, corpus):
    with pytest.raises(
        UserError, match=r"id [45][0-9] >= 40 rows .*wrong tokenizer for this model\?"
    ):
        draw(f"file:{corpus}", words, vocab_size=40, nsamples=75)


def test_no_data_is_an_error(words):
    with pytest.raises(UserError, match="no source"):
        draw("none", words, method="magnitude")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("self?temprature=1", "no option `temprature`; did you mean `temperature`"),
        ("self?temperature=0", r"`temperature` of `self`: got '0'; a number > 0 is needed"),
        ("self?temperature=hot", "got 'hot'"),
        ("self?top_p=1.5", "a number > 0 and <= 1"),
        ("self?top_k=2.5", "a whole number >= 0"),
        ("self?drop=1", "a number >= 0 and < 1"),
        ("self?top_k=1&top_k=2", "given twice"),
        ("self?prefixes=", "not empty"),
        ("self:bso", "no variant `bso`; did you mean `bos`"),
        ("self:x", "its variants: self:prefix, self:bos, self:chat"),
        ("self:bos?temperature=1", "`self:bos` has no option `temperature`"),
        ("self:bos?eos=stop", "`eos` of `self:bos`: got 'stop'; restart, suppress is needed"),
        ("self:bos?ramp=0", "a whole number >= 1"),
        ("self:chat?prompts=/no/such/file.txt", "prompts=/no/such/file.txt: no such file"),
        ("self?dedup=2", "a whole number >= 0 and <= 1"),
        ("self?mode=papper", "got 'papper'; paper is needed"),
        ("self?mode=paper&drop=0.1", "mode=paper writes with drop=0.2, got 0.1"),
        ("self?mode=paper&max_new_tokens=64", "mode=paper writes with max_new_tokens=2048"),
        ("self?prefixes=/no/such/file.txt", "prefixes=/no/such/file.txt: no such file"),
        ("random?seed=1", "no option `seed`; its options: none"),
        ("random:x", "takes no argument"),
        ("c4?bufer=3", "did you mean `buffer`"),
        ("hf:a/b:c:d:e:f", r"hf:ORG/NAME\[:config\]"),
        ("hf:a b/c", r"hf:ORG/NAME\[:config\]"),
        ("hf:./no-such-folder", "no folder"),
        ("file:/no/such/file.jsonl", "no file or folder"),
        ("task:x?include_path=/no/such/folder", "no such folder"),
    ],
)
def test_validation_names_the_fault_before_anything_is_loaded(expression, message):
    recipe = Recipe(method="wanda", sparsity=0.5, calibration=f"random+{expression}")
    with pytest.raises(UserError, match=message):
        validate_calibration(recipe)


def test_validation_passes_what_can_be_used(corpus):
    for expression in ("self", f"file:{corpus}?column=text", "c4*0.5+wikitext2*0.5", "random"):
        validate_calibration(Recipe(method="wanda", sparsity=0.5, calibration=expression))


def test_named_corpora_are_hub_sources():
    (term,) = parse_calibration("wikitext2?revision=abc")
    source = make_source(term)
    assert (source.path, source.config, source.split) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "train",
    )
    assert source.default_pack == "concat"
    assert make_source(parse_calibration("c4")[0]).default_pack == "longdoc"


class Disturbing(Source):
    """A third-party source that does what none should."""

    options = {"times": Option("whole", default=20, lowest=1)}

    def documents(self, context):
        random.random()
        np.random.rand()
        torch.rand(3)
        if context.seed and self.argument == "fail":
            raise RuntimeError("on purpose")
        for number in range(self.settings["times"]):
            yield Document(number, f"w{number} w1 w2 w3 w4 w5 w6 w7 w8 w9")


@pytest.fixture
def third_party(monkeypatch):
    rows = dict(registry.table("calibration"))
    rows["mine"] = registry.Entry(
        "calibration", "mine", f"{__name__}:Disturbing", distribution="other"
    )
    rows["broken"] = registry.Entry("calibration", "broken", "json:JSONDecoder")
    packs = registry.table("packing")
    monkeypatch.setattr(
        registry,
        "table",
        lambda kind: (
            {"calibration": rows, "packing": packs}.get(kind, {})
            if kind in ("calibration", "packing")
            else _methods(kind)
        ),
    )


_TABLE = registry.table


def _methods(kind):
    return _TABLE(kind)


def states():
    numpy = np.random.get_state()[1].tolist()
    return random.getstate(), numpy, torch.get_rng_state().tolist()


def test_a_third_party_source_works_and_global_random_state_is_kept(words, third_party):
    before = states()
    drawn = draw("mine?times=9", words, nsamples=3)
    assert drawn.sources[0]["documents"] == 9
    assert states() == before
    with pytest.raises(RuntimeError, match="on purpose"):
        draw("mine:fail", words)
    assert states() == before


def test_a_third_party_class_that_is_no_source_is_named(words, third_party):
    with pytest.raises(CalibError, match="json:JSONDecoder is not a subclass"):
        draw("broken", words)


def test_modes_of_a_model_are_put_back():
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluation_mode(model):  # noqa: PT012
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_random_state_is_put_back_after_an_exception():
    before = states()
    with pytest.raises(KeyError), random_state_untouched():  # noqa: PT012
        torch.rand(1)
        random.seed(1)
        raise KeyError
    assert states() == before


def test_derived_seeds():
    assert derive_seed(1, "a") == derive_seed(1, "a")
    assert len({derive_seed(1, "a"), derive_seed(1, "b"), derive_seed(2, "a"), derive_seed(1)}) == 4
    assert 0 <= derive_seed(5) < 2**63
