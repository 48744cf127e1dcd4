"""Mixtures end in ordinary calibration sets, found once, on documents that nobody judges by."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lm_calib_plugin import CalibrationSet, Recipe, compress
from lm_calib_plugin.bank import blends, searched
from lm_calib_plugin.bank.mixtures import draw, mixture_of
from lm_calib_plugin.bank.searched import Searched
from lm_calib_plugin.bank.traces import align_shares, gradient_traces
from lm_calib_plugin.calibration.folds import fold_of
from lm_calib_plugin.errors import UserError
from tests.bank.corpora import QUIET, SHORT, WANDA, documents, inputs, task_of, write
from tests.tiny import make_model as make_any_model
from tests.tiny import make_tokenizer

SEARCHED = {
    "minimax": "minimax({a}+{b})",
    "weighted": "weighted({a}*0.8+{b}*0.2)",
    "no_worse": "no_worse({a}+{b})?limit=1.05",
}
GPTQ = {"method": "gptq", "bits": 3, "group_size": 16, "heldout": 0}


def make_model() -> Any:
    return make_any_model(num_hidden_layers=2)


@pytest.fixture
def text(tmp_path: Path) -> dict[str, str]:
    kinds = {"a": "prose", "b": "digits", "c": "letters"}
    return {name: write(tmp_path, kind) for name, kind in kinds.items()}


def recipe(expression: str, text: dict[str, str], **fields: Any) -> Recipe:
    return Recipe(**{**WANDA, **SHORT, **fields, "calibration": expression.format(**text)})


def run(made: Recipe, model: Any = None) -> Any:
    return compress(model or make_model(), make_tokenizer(), made, QUIET)


def mixture(report: Any) -> dict[str, Any]:
    found: dict[str, Any] = report.calibration["sources"][0]["mixture"]
    return found


def mixes(cache: Path) -> list[Path]:
    return sorted((cache / "mixes").glob("*.json"))


def noted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Note the parts of every bank that is filled."""
    filled: list[Any] = []
    real = searched.build_bank

    def build(model: Any, layers: Any, blocks: Any, parts: Any, *rest: Any, **more: Any) -> Any:
        filled.append(parts)
        return real(model, layers, blocks, parts, *rest, **more)

    monkeypatch.setattr(searched, "build_bank", build)
    return filled


@pytest.mark.parametrize("name", list(SEARCHED))
def test_a_search_ends_in_a_set_of_documents_to_choose_from(
    name: str, text: dict[str, str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = noted(monkeypatch)
    report = run(recipe(SEARCHED[name], text, nsamples=10, pack="longdoc"))
    found, drawn = mixture(report), report.calibration_set
    assert drawn.nsamples == report.calibration["nsamples"] == 10
    assert report.recipe["nsamples"] == 10
    shares = found["shares"]
    assert set(shares) == {text["a"], text["b"]}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert min(shares.values()) >= 0.02 - 1e-6
    assert found["fold"] == "choose"
    assert found["method"] == "wanda"
    assert set(found["regrets"]) == set(shares)
    kinds = {text["a"]: documents("prose"), text["b"]: documents("digits")}
    for source in drawn.sources:
        assert source["fold"] == "choose"
        assert source["share"] == len(source["rows"]) / 10
        assert abs(source["share"] - shares[source["source"]]) < 1 / 10
        assert source["weight"] == pytest.approx(shares[source["source"]], abs=1e-5)
        assert len(source["indices"]) == len(source["rows"])
        for number, _ in source["indices"]:
            assert fold_of(kinds[source["source"]][number]) == "choose"
    assert sorted(row for s in drawn.sources for row in s["rows"]) == list(range(10))
    # What the search was judged on shares no document with what it chose from.
    (parts,) = filled
    seen = {
        fold: {
            (p.source, number)
            for p in parts
            if p.fold == fold
            for number, _ in p.calibration.sources[0]["indices"]
        }
        for fold in ("choose", "validate")
    }
    assert seen["choose"]
    assert seen["validate"]
    assert not seen["choose"] & seen["validate"]
    for source, number in seen["validate"]:
        assert fold_of(kinds[source][number]) == "validate"
    assert [p.name for p in (cache_dir / "mixes").iterdir() if p.suffix == ".bank"] == []
    json.dumps(report.summary(), allow_nan=False)


def test_rows_of_a_source_hold_its_text(text: dict[str, str]) -> None:
    drawn = run(recipe(SEARCHED["minimax"], text, nsamples=9)).calibration_set
    tokenizer = make_tokenizer()
    first, second = ({*" ".join(documents(kind)).split()} for kind in ("prose", "digits"))
    for source, words in zip(drawn.sources, (first, second), strict=True):
        for row in source["rows"]:
            ids = drawn.sequences[row]
            assert set(tokenizer.convert_ids_to_tokens(ids.tolist())) <= words


def test_the_second_run_searches_nothing(
    text: dict[str, str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(recipe(SEARCHED["minimax"], text))
    (file,) = mixes(cache_dir)

    def fails(*_a: Any, **_k: Any) -> None:
        raise AssertionError("searched again")

    with monkeypatch.context() as patched:
        patched.setattr(searched, "search_mix", fails)
        patched.setattr(searched, "build_bank", fails)
        again = run(recipe(SEARCHED["minimax"], text))
    assert again.key == first.key
    assert again.weights_digest == first.weights_digest
    assert mixture(again) == mixture(first)
    whole = json.loads(file.read_text())
    damaged = [
        file.read_text()[:-9],
        "[]",
        json.dumps(whole | {"mix": whole["mix"] | {"damp": 3.0}}),
        json.dumps(whole | {"mix": None}),
        json.dumps({"mix": whole["mix"]}),
    ]
    for content in damaged:
        file.write_text(content)
        assert Searched._recalled(file.with_suffix("")) is None
    file.write_bytes(b"\xff\xfe")
    mended = run(recipe(SEARCHED["minimax"], text))
    assert mended.key == first.key
    assert json.loads(file.read_text()) == whole
    assert Searched._recalled(file.with_suffix("")) == whole["mix"]


def test_two_objectives_are_two_searches(
    text: dict[str, str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = searched.search_mix
    kept: list[Any] = []

    def once(*args: Any, **more: Any) -> Any:  # what is found does not matter here
        kept[:] = kept or [found(*args, **more)]
        return kept[0]

    monkeypatch.setattr(searched, "search_mix", once)
    for expression in (
        SEARCHED["minimax"],
        SEARCHED["weighted"],
        "weighted({a}*0.3+{b}*0.7)",
        "no_worse({a}+{b})?limit=1.05",
        "no_worse({a}+{b})?limit=1.5",
    ):
        draw(task_of(recipe(expression, text), make_model()))
    assert len(mixes(cache_dir)) == 5
    draw(task_of(recipe(SEARCHED["minimax"], text, sparsity=0.6), make_model()))
    assert len(mixes(cache_dir)) == 6


def test_an_interrupted_search_goes_on(
    text: dict[str, str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_calib_plugin.bank.build import _Writer

    finish, done = _Writer.finish, []

    def stops(self: Any, index: int, *rest: Any) -> None:
        if index == 1 and len(done) == 1:
            raise KeyboardInterrupt
        done.append(index)
        finish(self, index, *rest)

    monkeypatch.setattr(_Writer, "finish", stops)
    made = recipe(SEARCHED["minimax"], text)
    with pytest.raises(KeyboardInterrupt):
        run(made)
    assert mixes(cache_dir) == []
    done.append(-1)
    resumed = run(made)
    assert done == [0, -1, 1]  # the first block is not done again
    assert not list((cache_dir / "mixes").glob("*.bank"))
    monkeypatch.setenv("LM_CALIB_CACHE", str(cache_dir / "elsewhere"))
    assert run(made).key == resumed.key

    # Also between the bank and the search.
    monkeypatch.setenv("LM_CALIB_CACHE", str(cache_dir / "third"))

    def interrupted(*_a: Any, **_k: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(searched, "search_mix", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(made)
    count = len(done)
    assert run(made).key == resumed.key
    assert len(done) == count
    assert not list((cache_dir / "third" / "mixes").glob("*.bank"))


@pytest.mark.parametrize(
    ("options", "searches"),
    [
        (GPTQ, True),
        ({**GPTQ, "damp": 0.02}, False),
        ({"method": "sparsegpt", "sparsity": 0.5}, True),
        ({"method": "sparsegpt", "sparsity": 0.5, "damp": 0.3}, False),
        (WANDA, False),
    ],
    ids=["gptq", "gptq typed", "sparsegpt", "sparsegpt typed", "wanda"],
)
def test_the_ridge_is_searched_where_it_was_left_open(
    options: dict[str, Any],
    searches: bool,
    text: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    real = searched.search_mix

    def found(*args: Any, search_damp: bool, **more: Any) -> Any:
        asked.append(search_damp)
        mix = real(*args, search_damp=search_damp, **more)
        # A ridge that is no default, so that one sees where it goes.
        return mix if mix.damp is None else searched.replace(mix, damp=0.3)

    monkeypatch.setattr(searched, "search_mix", found)
    made = Recipe(**{**SHORT, **options, "calibration": SEARCHED["minimax"].format(**text)})
    report = run(made)
    assert asked == [searches]
    assert mixture(report)["damp"] == (0.3 if searches else None)
    if searches:
        assert report.recipe["damp"] == 0.3
        assert {row.damp for row in report.layers} != {None}
        typed = run(made.replaced(damp=0.3, calibration="random"))
        assert typed.recipe["damp"] == 0.3
        # The ridge is really used: the same set with the default ridge gives other weights.
        plain = compress(
            make_model(),
            None,
            Recipe(**{**SHORT, **options, "calibration": "random"}),
            QUIET,
            report.calibration_set,
        )
        assert plain.weights_digest != report.weights_digest
        same = compress(
            make_model(), None, Recipe(**options, damp=0.3), QUIET, report.calibration_set
        )
        assert same.weights_digest == report.weights_digest
    else:
        assert report.recipe.get("damp") == options.get("damp")


def test_the_set_alone_gives_the_same_model(text: dict[str, str]) -> None:
    """No weight is touched and no random number drawn before the set is there."""
    made = recipe(SEARCHED["minimax"], text)
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for expression in (SEARCHED["minimax"], "tasa({a}+{b}+{c})", "cross({a}+{b})"):
        draw(task_of(recipe(expression, text), model))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    found = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert state[:2] == found[:2]
    assert torch.equal(state[2], found[2])
    inline = run(made)
    alone = compress(make_model(), None, Recipe(**WANDA), QUIET, inline.calibration_set)
    assert alone.weights_digest == inline.weights_digest
    assert alone.key == inline.key


def test_zero_strength_searches_nothing(
    text: dict[str, str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searched, "search_mix", lambda *a, **k: pytest.fail("searched"))
    model = make_model()
    report = run(recipe("minimax({a}+{b}+{c})", text, sparsity=0), model)
    assert list(mixture(report)["shares"].values()) == [1 / 3] * 3
    assert [s["nsequences"] for s in report.calibration_set.sources] == [2, 2, 2]
    for name, value in make_model().state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_a_share_may_come_to_no_sequence(
    text: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = searched.search_mix

    def lopsided(*args: Any, **more: Any) -> Any:
        return searched.replace(real(*args, **more), shares={text["a"]: 0.979999, text["b"]: 0.02})

    monkeypatch.setattr(searched, "search_mix", lopsided)
    drawn = run(recipe(SEARCHED["minimax"], text)).calibration_set
    assert [s["nsequences"] for s in drawn.sources] == [6, 0]
    assert drawn.sources[1]["warnings"] == ["a share of 0.020 of 6 sequences is none"]
    assert drawn.nsamples == 6


def test_sequences_of_several_lengths_keep_their_weights(text: dict[str, str]) -> None:
    for expression in (SEARCHED["minimax"], "cross({a}+{b})?lambda=0.25"):
        made = recipe(expression, text, pack="multilen", nsamples=24)
        drawn = run(made).calibration_set
        assert drawn.weights is not None
        for source in drawn.sources:
            # Inside a source every sequence counts alike, whatever its length.
            sizes = [drawn.weights[r] * len(drawn.sequences[r]) for r in source["rows"]]
            assert sizes == pytest.approx([sizes[0]] * len(sizes))
    sizes = [w * len(ids) for w, ids in zip(drawn.weights, drawn.sequences, strict=True)]
    assert sum(sizes[row] for row in drawn.sources[0]["rows"]) == pytest.approx(sum(sizes) / 4)
    assert sum(sizes) == pytest.approx(drawn.tokens)


def test_selection_chooses_and_never_judges(
    text: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = noted(monkeypatch)
    drawn = run(recipe(SEARCHED["minimax"], text, select="zip", pool=12)).calibration_set
    assert drawn.nsamples == 6
    for source in drawn.sources:
        assert len(source["chosen"]) == len(source["rows"])
    (parts,) = filled
    for part in parts:
        assert ("selection" in part.calibration.sources[0]) == (part.fold == "choose")


# --- cross -------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("count", [6, 7])
def test_cross_weighs_two_hessians(share: float, count: int, text: dict[str, str]) -> None:
    made = recipe(f"cross({{a}}+{{b}})?lambda={share}", text, nsamples=count)
    model = make_model()
    drawn = draw(task_of(made, model)).calibration
    weights = drawn.weights or (1.0,) * count
    first, second = (source["rows"] for source in drawn.sources)
    assert sum(weights[row] for row in first) / sum(weights) == pytest.approx(share)
    assert sum(weights) == pytest.approx(count)
    assert abs(len(first) - len(second)) <= 1
    seen = inputs(model, drawn.sequences)
    for name in seen[0]:
        grams = [x[name].t() @ x[name] for x in seen]
        domain = sum(grams[row] for row in first) / len(first)
        general = sum(grams[row] for row in second) / len(second)
        asked = share * domain + (1 - share) * general
        found = sum(w * g for w, g in zip(weights, grams, strict=True)) / count
        torch.testing.assert_close(found, asked)
    assert drawn.sources[0]["mixture"]["lambda"] == share


def test_cross_of_equal_halves_is_the_plain_sum(text: dict[str, str]) -> None:
    crossed = draw(task_of(recipe("cross({a}+{b})", text))).calibration
    plain = draw(task_of(recipe("{a}+{b}", text))).calibration
    assert crossed.calib_id == plain.calib_id


def test_cross_takes_finished_sets(text: dict[str, str], tmp_path: Path) -> None:
    ids = [[3, 4, 5, 6]] * 8
    CalibrationSet.of(ids, seqlen=4).save(tmp_path / "set")
    found = draw(task_of(recipe(f"cross(set:{tmp_path}/set+{{b}})?lambda=0.2", text))).calibration
    rows = found.sources[0]["rows"]
    assert [found.sequences[row].tolist() for row in rows] == ids[:3]


# --- tasa --------------------------------------------------------------------------------


def test_tasa_takes_the_shares_of_aligned_traces(text: dict[str, str]) -> None:
    made = recipe("tasa({a}+{b}+{c})?sequences=3", text, nsamples=10)
    task = task_of(made)
    found = draw(task).calibration

    def traces(name: str) -> torch.Tensor:
        alone = task_of(recipe(name, text, nsamples=3))
        drawn = draw(alone).calibration
        return gradient_traces(alone.model, alone.layers, drawn.sequences)

    expected = align_shares(
        torch.stack([traces("{b}"), traces("{c}")]), traces("{a}"), floor=blends.FLOOR
    )
    record = found.sources[0]["mixture"]
    assert list(record["shares"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert record["sequences"] == 3
    assert [s["source"] for s in found.sources] == [text["b"], text["c"]]
    assert found.nsamples == 10
    for source, share in zip(found.sources, expected.tolist(), strict=True):
        assert abs(source["nsequences"] - 10 * share) < 1
    plain = recipe(
        "{b}*" + f"{expected[0]:.9f}" + "+{c}*" + f"{expected[1]:.9f}", text, nsamples=10
    )
    assert draw(task_of(plain)).calibration.calib_id == found.calib_id


# --- what is refused ---------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("minimax({a})", {}, "calibration", "has 1 source; `minimax` takes 2 or more"),
    ("cross({a}+{b}+{c})", {}, "calibration", "has 3 sources; `cross` takes 2"),
    ("cross({a})", {}, "calibration", "has 1 source; `cross` takes 2"),
    ("tasa({a}+{b})", {}, "calibration", r"takes 3 or more; for instance tasa\(c4\+self\+code\)"),
    ("minimax({a}+{a})", {}, "calibration", "twice; every source once"),
    ("weighted({a}*0.2+{a}*0.8)", {}, "calibration", "twice; every source once"),
    ("minimax:x({a}+{b})", {}, "calibration", "got the argument 'x'"),
    ("minimax({a}*0.7+{b}*0.3)", {}, "calibration", r"weighted\(A\*0.7\+B\*0.3\)"),
    ("cross({a}*0.7+{b}*0.3)", {}, "calibration", "got weights"),
    ("minimax(set:{set}+{b})", {}, "calibration", "a finished set has no documents left"),
    ("minimax(null:shuffle(set:{set})+{b})", {}, "calibration", "a finished set"),
    ("minimax({a}+{b})?limit=1.1", {}, "calibration", r"`minimax\(A\+B\)` has no option `limit`"),
    ("no_worse({a}+{b})?limt=1.1", {}, "calibration", "did you mean `limit`"),
    ("no_worse({a}+{b})?limit=0.5", {}, "calibration", "got '0.5'; a number >= 1 is needed"),
    ("cross({a}+{b})?lambda=0", {}, "calibration", "a number > 0 and < 1 is needed"),
    ("cross({a}+{b})?lambda=1", {}, "calibration", "a number > 0 and < 1 is needed"),
    ("tasa({a}+{b}+{c})?sequences=0", {}, "calibration", "a whole number >= 1 is needed"),
    ("minimax({a}+{b})", {"method": "magnitude"}, "calibration", "which uses no data"),
    ("cross({a}+{b})", {"method": "magnitude"}, "calibration", "which uses no data"),
    ("minimax({a}+{b})", {"fold": "judge"}, "fold", "drop `fold`"),
    ("cross({a}+{b})", {"nsamples": 1}, "nsamples", "2 or more"),
    ("minimax({a}+{b})", {"targets": "lm_head", "untie": True}, "targets", "decoder blocks"),
    ("tasa({a}+{b}+{c})", {"targets": "lm_head", "untie": True}, "targets", "decoder blocks"),
    ("minimax({a}+{b})+{c}", {}, "calibration", "is one term of a sum"),
    ("minimax(minimax({a}+{b})+{c})", {}, "calibration", "stands inside another source"),
    ("null:shuffle(minimax({a}+{b}))", {}, "calibration", "stands inside another source"),
    ("minimax({a}+{b})", {"nsamples": 500}, "nsamples", "500"),
]


@pytest.mark.parametrize(("expression", "fields", "argument", "message"), BAD, ids=lambda v: str(v))
def test_what_can_not_be_mixed(
    expression: str,
    fields: dict[str, Any],
    argument: str,
    message: str,
    text: dict[str, str],
    tmp_path: Path,
    cache_dir: Path,
) -> None:
    CalibrationSet.of([[3, 4, 5]] * 8, seqlen=3).save(tmp_path / "set")
    model = make_model()
    with pytest.raises(UserError, match=message) as caught:
        run(recipe(expression, text | {"set": str(tmp_path / "set")}, **fields), model)
    assert caught.value.argument == argument
    for name, value in make_model().state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert mixes(cache_dir) == []


def test_only_mixtures_are_mixtures(text: dict[str, str]) -> None:
    assert mixture_of(recipe("{a}+{b}", text)) is None
    assert mixture_of(Recipe(method="magnitude", sparsity=0.5)) is None
    assert mixture_of(recipe("minimax({a}+{b})", text)).name == "minimax"  # type: ignore[union-attr]
