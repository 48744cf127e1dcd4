"""Selection between packing and the final set."""

from __future__ import annotations

import pytest
import torch
from conftest import context, draw, numbered, write_jsonl

from lm_calib_plugin import registry
from lm_calib_plugin.calibration import build, validate_calibration
from lm_calib_plugin.calibration.folds import fold_of
from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.stage import POOL, TARGETS, Choice
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.expression import shares
from lm_calib_plugin.recipe import Recipe

NAMES = list(registry.table("selection"))
TARGETED = [n for n, row in registry.table("selection").items() if row.options]
MODEL_FREE = ["random", "zip"]


@pytest.fixture
def corpus(tmp_path):
    texts = [f"w{i % 60} w{i // 60 + 7} {rest}" for i, rest in enumerate(numbered(120, 18))]
    return write_jsonl(tmp_path / "corpus.jsonl", texts)


def ids(drawn):
    return [tuple(sequence.tolist()) for sequence in drawn.sequences]


def given(name, corpus):
    return {"select_target": f"file:{corpus}?column=text"} if name in TARGETED else {}


def test_without_select_and_pool_the_draw_is_that_of_before(words, corpus, monkeypatch):
    plain = draw(f"file:{corpus}", words)
    monkeypatch.setattr(build, "_chosen", None)  # the stage is not even entered
    assert draw(f"file:{corpus}", words, select="random").calib_id == plain.calib_id
    assert "selection" not in plain.sources[0]
    assert "chosen" not in plain.sources[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_picks_from_the_pool_what_is_asked(words, corpus, model, name):
    pool = draw(f"file:{corpus}", words, pack="longdoc", nsamples=40)
    more = given(name, corpus)
    drawn, again = (
        draw(f"file:{corpus}", words, model, pack="longdoc", select=name, pool=40, **more)
        for _ in range(2)
    )
    assert drawn.calib_id == again.calib_id
    record = drawn.sources[0]
    facts = record["selection"]
    assert (facts["selector"], facts["pool"]) == (name, 40)
    assert facts["seconds"] >= 0
    assert ids(drawn) == [ids(pool)[place] for place in record["chosen"]]
    assert record["indices"] == [pool.sources[0]["indices"][i] for i in record["chosen"]]
    assert record["nsequences"] == 4
    expected = set() if name in MODEL_FREE else {"pool", "target"} if more else {"pool"}
    assert set(facts["passes"]) == expected
    if more:
        assert facts["target"]["nsequences"] == TARGETS
    short = drawn.summary()["sources"][0]
    assert "chosen" not in short
    assert short["selection"]["pool"] == 40


@pytest.mark.parametrize("name", NAMES)
def test_a_pool_of_what_is_asked_is_taken_whole(words, corpus, model, name):
    plain = draw(f"file:{corpus}", words)
    drawn = draw(f"file:{corpus}", words, model, select=name, pool=4, **given(name, corpus))
    assert drawn.calib_id == plain.calib_id
    assert drawn.sources[0]["chosen"] == [0, 1, 2, 3]


def test_default_pool_is_eight_times_what_is_asked(words, corpus):
    drawn = draw(f"file:{corpus}", words, select="zip")
    assert drawn.sources[0]["selection"]["pool"] == POOL * 4
    assert draw(f"file:{corpus}", words, pool=9).sources[0]["selection"]["pool"] == 9


def test_each_source_selects_its_own_share(words, corpus):
    drawn = draw(f"file:{corpus}*0.7+random*0.3", words, select="zip", nsamples=10, pool=50)
    assert [s["nsequences"] for s in drawn.sources] == [7, 3]
    assert [s["selection"]["pool"] for s in drawn.sources] == [35, 15]
    rows = sorted(row for s in drawn.sources for row in s["rows"])
    assert rows == list(range(10))


@pytest.mark.parametrize("weights", [(0.34, 0.33, 0.33), (0.98, 0.01, 0.01), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize(("nsamples", "pool"), [(1, 1), (1, 2), (3, 3), (3, 4), (7, 90)])
def test_a_share_of_the_pool_is_never_too_small(words, weights, nsamples, pool):
    terms = [{"source": "random", "weight": weight} for weight in weights]
    recipe = Recipe(method="wanda", sparsity=0.5, calibration=terms, nsamples=nsamples, pool=pool)
    choice = Choice(recipe)
    for term, count in zip(recipe.terms, shares(recipe.terms, nsamples), strict=True):
        widened = choice.widened(term, context(words, count=count))
        assert widened.count >= count
        assert bool(widened.count) == bool(count)
        assert widened.count_of == ("pool" if widened.count > count else "nsamples")


def test_pool_and_target_are_of_the_fold(words, corpus, model):
    texts = [f"w{i % 60} w{i // 60 + 7} {rest}" for i, rest in enumerate(numbered(120, 18))]
    drawn = draw(
        f"file:{corpus}",
        words,
        model,
        select="centroid",
        pack="pad",
        pool=20,
        fold="choose",
        select_target=f"file:{corpus}",
    )
    assert {fold_of(texts[i]) for i in drawn.sources[0]["indices"]} == {"choose"}


def test_too_small_a_source_names_the_pool(words, corpus, model):
    with pytest.raises(UserError) as error:
        draw(f"file:{corpus}", words, select="zip", pack="pad", pool=500)
    assert "pool: found 120 windows of 8 tokens in 120 documents, recipe asks 500" in str(
        error.value
    )
    assert "lower pool or seqlen" in str(error.value)
    few = write_jsonl(corpus.parent / "few.jsonl", numbered(3, 20))
    with pytest.raises(UserError) as error:
        draw(
            f"file:{corpus}",
            words,
            model,
            select="centroid",
            pack="pad",
            pool=9,
            select_target=f"file:{few}",
        )
    assert "select_target: found 3 windows" in str(error.value)
    assert "recipe asks 32; lower seqlen, or" in str(error.value)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in MODEL_FREE])
def test_a_selector_that_needs_the_model_says_so(words, corpus, name):
    with pytest.raises(UserError) as error:
        draw(f"file:{corpus}", words, select=name, **given(name, corpus))
    assert f"select: `{name}` needs the model in memory" in str(error.value)
    assert "selectors that need none: random, zip" in str(error.value)


def test_the_target_is_validated_before_anything_is_loaded():
    recipe = Recipe(
        method="wanda", sparsity=0.5, select="centroid", select_target="file:/no/such/file.txt"
    )
    with pytest.raises(UserError, match="^select_target: no file or folder"):
        validate_calibration(recipe)


def test_fields_survive_the_plain_form():
    recipe = Recipe(
        method="wanda",
        sparsity=0.5,
        calibration="random",
        select="grad_match",
        select_target="random*0.5+self*0.5",
        nsamples=4,
        pool=20,
        fold="judge",
    )
    assert Recipe(**recipe.to_metadata()) == recipe


class Backwards(Selector):
    """A third-party selector that wants a target."""

    needs = frozenset({"nll"})
    takes_target = True

    def select(self, candidates, count, features, seed):
        assert len(features.target.nll) == TARGETS
        self.facts = {"worst": float(features.nll.max())}
        return sorted(range(len(candidates)), key=lambda i: float(features.nll[i]))[
            : -count - 1 : -1
        ]


class Broken(Selector):
    def select(self, candidates, count, features, seed):
        return [0] * count


@pytest.fixture
def third_party(monkeypatch):
    table = registry.table
    rows = dict(table("selection"))
    for name, target in (("backwards", "Backwards"), ("broken", "Broken")):
        rows[name] = registry.Entry("selection", name, f"{__name__}:{target}", distribution="other")
    rows["none"] = registry.Entry("selection", "none", "json:JSONDecoder", distribution="other")
    monkeypatch.setattr(
        registry, "table", lambda kind: rows if kind == "selection" else table(kind)
    )


def test_a_third_party_selector_works(words, corpus, model, third_party):
    drawn = draw(f"file:{corpus}", words, model, select="backwards", select_target="random")
    assert drawn.sources[0]["selection"]["worst"] > 0
    with pytest.raises(UserError, match="select_target: missing"):
        Recipe(method="wanda", sparsity=0.5, select="backwards")
    with pytest.raises(CalibError, match="`broken` gave 1 different places, 4 asked"):
        draw(f"file:{corpus}", words, model, select="broken")
    with pytest.raises(CalibError, match="json:JSONDecoder is not a subclass"):
        draw(f"file:{corpus}", words, model, select="none")


def test_global_random_state_is_untouched(words, corpus, model):
    before = torch.get_rng_state()
    draw(f"file:{corpus}", words, model, select="kmeans")
    assert torch.equal(torch.get_rng_state(), before)
