"""``lm-calib inspect divergence``: planted damage is found and named; nothing is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_calib_plugin import CalibrationSet, cli, compress
from lm_calib_plugin.calibration.folds import fold_of
from lm_calib_plugin.comparison import spearman
from lm_calib_plugin.diagnostics.divergence import (
    Question,
    compared,
    diagnose,
    residual_norms,
)
from lm_calib_plugin.diagnostics.divergence_report import buckets, document, half_of
from lm_calib_plugin.diagnostics.pair import Pair
from lm_calib_plugin.diagnostics.scoring import divergence_of
from lm_calib_plugin.diagnostics.tokens import TokenDivergence
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.loading import Loading
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime
from tests.bank.corpora import documents, write
from tests.diagnostics.test_tokens import naive
from tests.tiny import ARCHITECTURES, make_model, make_tokenizer, random_ids, saved_model

QUIET = Runtime(progress=False)
WANDA: dict[str, Any] = {"method": "wanda", "sparsity": 0.5, "nsamples": 6, "seqlen": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return saved_model(folder, num_hidden_layers=2, initializer_range=0.3)


def ask(model: str, *texts: str, recipe: dict[str, Any] | None = None, **more: Any) -> Any:
    given = {"samples": 5, "length": 12, **more}
    asked = Recipe(**{**WANDA, **recipe}) if recipe is not None else None
    return diagnose(Question(Loading(model, device="cpu"), asked, texts=texts, **given), QUIET)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", "divergence", *arguments])
    return int(end.value.code or 0)


def drawn(sequences: list[torch.Tensor]) -> CalibrationSet:
    return CalibrationSet.of(sequences, seqlen=max(map(len, sequences)))


def test_as_naive_on_whole_models(model: str, tmp_path: Path) -> None:
    text = write(tmp_path, "prose")
    found = ask(model, text, recipe={"calibration": text})
    folder = tmp_path / "set"
    options = ["--nsamples", "5", "--seqlen", "12", "--fold", "judge", "--quiet"]
    with pytest.raises(SystemExit):
        cli.main(["calibrate", text, "--pretrained", model, "--out", str(folder), *options])
    kept = CalibrationSet.load(folder)
    data = found.data["texts"][0]
    assert data["set"]["calib_id"] == kept.calib_id
    again = ask(model, f"set:{folder}", recipe={"calibration": text}, samples=2, length=5)
    assert again.data["texts"][0]["js"] == data["js"]  # the whole set
    pair = [AutoModelForCausalLM.from_pretrained(model).eval() for _ in range(2)]
    compress(pair[1], make_tokenizer(), Recipe(**WANDA, calibration=text), QUIET)
    parts = []
    for ids in kept.sequences:
        with torch.no_grad():
            logits = [m(ids[None]).logits[0, :-1].double().numpy() for m in pair]
        parts.append(naive(*logits, ids[1:].numpy()))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert data["positions"] == 5 * 11
    assert data["js"]["mean"] == pytest.approx(whole["js"].mean(), rel=1e-4)
    assert data["kl"]["mean"] == pytest.approx(whole["kl"].mean(), rel=1e-4)
    assert data["flip_rate"]["mean"] == whole["flipped"].mean()
    assert data["perplexity"]["dense"] == pytest.approx(np.exp(whole["nll_dense"].mean()), rel=1e-4)
    rises = [(part["nll_compressed"] - part["nll_dense"]).mean() for part in parts]
    for row, rise in zip(data["sequences"], rises, strict=True):
        assert row["rise"] == pytest.approx(rise, abs=1e-5)
    worst = data["worst"][0]
    owner, place = divmod(int(whole["js"].argmax()), 11)
    assert (worst["sequence"], worst["position"]) == (owner, place + 1)
    best = make_tokenizer().decode(
        [int(pair[0](kept.sequences[owner][None]).logits[0, place].argmax())]
    )
    assert worst["dense"][0] == best


def test_two_that_are_the_same(model: str, tmp_path: Path) -> None:
    text = write(tmp_path, "prose")
    for more in ({"recipe": {"sparsity": 0, "calibration": text}}, {"compressed": model}):
        found = ask(model, text, **more)
        assert found.findings == (
            [f"{text}: both models say the same, bit by bit, at all 55 tokens."]
        )
        data = found.data["texts"][0]
        assert set(data["js"].values()) == {0.0}
        assert data["worst"] == []
        assert data["rise"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_planted_hard_document_and_token_are_named() -> None:
    """One word is broken: sequences full of it are the hardest, and it is named."""
    dense, other = make_model(initializer_range=0.3), make_model(initializer_range=0.3)
    word = 77
    with torch.no_grad():
        other.model.embed_tokens.weight[word] *= -3
    sequences = [torch.clamp(ids, max=word - 1) for ids in random_ids([20] * 6)]
    sequences[4][::2] = word
    sequences[2][11] = word
    pair = Pair(dense, other, make_tokenizer(), "dense", "other")
    found = compared("text", drawn(sequences), pair, progress=False)
    assert found.hardest[0] == 4
    assert {w.sequence for w in found.worst} <= {2, 4}
    untouched = [i for i in range(6) if i not in (2, 4)]
    assert all(float(found.parts[i].js.max()) == 0 for i in untouched)
    assert float(found.parts[2].js[:11].max()) == 0
    (first,) = [f for f in document(pair, [found], {}).findings if "hardest" in f]
    assert "the hardest is sequence 4" in first


def test_norms_of_the_last_residual_stream() -> None:
    model = make_model()
    sequences = random_ids([9, 2, 14, 1])[:3]
    with residual_norms(model) as found:
        divergence_of(model, make_model(seed=1), [*sequences, *random_ids([9], seed=4)], False)
    assert len(found) == 4
    for ids in sequences:
        norm = found[tuple(ids.tolist())]
        seen: list[torch.Tensor] = []
        hook = model.model.norm.register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0][0])
        )
        with torch.no_grad():
            model(ids[None])
        hook.remove()
        rows = seen[0][1:-1] if len(ids) > 2 else seen[0][:-1]
        assert norm == pytest.approx(float(rows.double().norm(dim=-1).mean()), rel=1e-5)
    assert not model.model.layers[-1]._forward_hooks
    assert not model.model.embed_tokens._forward_pre_hooks


def test_sequences_of_one_token_hold_nothing() -> None:
    models = [make_model(seed=seed, initializer_range=0.3) for seed in (0, 1)]
    pair = Pair(*models, make_tokenizer(), "a", "b")
    found = compared("text", drawn(random_ids([1, 9, 9])), pair, progress=False)
    assert len(found.parts) == 2
    told = document(pair, [found], {}).findings
    assert "text: 1 sequences of one token hold nothing to compare." in told
    with pytest.raises(UserError, match="all sequences of text have one token"):
        compared("text", drawn(random_ids([1, 1])), pair, progress=False)


def test_the_norm_that_foretells_is_told() -> None:
    """The head is damaged by the same amount everywhere: rises follow what is planted."""
    dense = make_model(initializer_range=0.3)
    pair = Pair(dense, make_model(seed=1, initializer_range=0.3), make_tokenizer(), "a", "b")
    found = compared("text", drawn(random_ids([16] * 8)), pair, progress=False)
    assert found.related is not None
    assert found.related.value == pytest.approx(spearman(found.rises, found.norms).value)
    few = compared("text", drawn(random_ids([16] * 3)), pair, progress=False)
    assert few.related is None


def test_the_text_is_that_of_the_calibration_without_its_documents(
    model: str, tmp_path: Path
) -> None:
    text = write(tmp_path, "prose")
    found = ask(model, recipe={"calibration": text, "fold": "choose", "pack": "longdoc"})
    (data,) = found.data["texts"]
    assert data["text"] == text
    assert data["set"]["sources"][0]["fold"] == "judge"
    assert data["set"]["sources"][0]["pack"] == "longdoc"
    assert not any(row["in_calibration"] for row in data["sequences"])
    assert not any("warning" in finding for finding in found.findings)


def test_calibrated_on_what_is_judged(model: str, tmp_path: Path) -> None:
    """The calibration holds all documents, those of the judge too; this is said and counted."""
    texts = [text for text in documents("prose", 20) if fold_of(text) == "judge"]
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    count = len(texts)
    recipe = {"calibration": f"file:{file}", "pack": "pad", "nsamples": count, "seqlen": 40}
    found = ask(model, recipe=recipe, samples=count, length=40)
    rows = found.data["texts"][0]["sequences"]
    assert all(row["in_calibration"] for row in rows)
    (warning,) = [f for f in found.findings if "warning" in f]
    assert f"{count} of {count} sequences overlap" in warning
    assert "--fold choose" in warning


def test_a_mixture_is_looked_at_by_its_sources(model: str, tmp_path: Path) -> None:
    names = [write(tmp_path, kind) for kind in ("prose", "digits")]
    question = Question(
        Loading(model), Recipe(**WANDA, calibration=f"minimax({names[0]}+{names[1]})")
    )
    assert list(question.recipes()) == [f"{names[0]}+{names[1]}"]


def test_places_and_halves() -> None:
    zeros = torch.zeros(10, dtype=torch.float64)
    part = TokenDivergence(torch.arange(10.0).double(), zeros, zeros, zeros, zeros, zeros)
    short = TokenDivergence(*(v[:2] for v in vars(part).values()))
    found = buckets([part, short])
    assert [(a, b, js.tolist()) for a, b, js, _ in found] == [
        (1, 1, [0, 0]),
        (2, 3, [1, 2, 1]),
        (4, 7, [3, 4, 5, 6]),
        (8, 10, [7, 8, 9]),
    ]
    assert half_of(np.array([1.0, 1.0, 8.0, 0.0])) == 0.25
    assert half_of(np.array([1.0, 1.0, 1.0, 1.0])) == 0.5


def test_the_command(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prose, digits = write(tmp_path, "prose"), write(tmp_path, "digits")
    options = ["--method", "wanda", "--sparsity", "0.5", "--calibration", prose]
    options += ["--nsamples", "6", "--seqlen", "12", "--text-samples", "5", "--text-length", "12"]
    out = tmp_path / "out"
    texts = ["--text", prose, "--text", digits]
    code = command("--pretrained", model, *options, *texts, "--out", str(out), "--quiet")
    assert code == 0
    shown = capsys.readouterr().out
    assert f"* {prose}: JS " in shown
    assert f"* {digits}: JS " in shown
    data = json.loads((out / "divergence.json").read_text())
    assert [one["text"] for one in data["texts"]] == [prose, digits]
    assert {"pretrained", "compressed", "recipe_key", "versions", "calibration"} <= data.keys()
    page = (out / "divergence.html").read_text()
    assert page.count("<figure>") == 2
    assert "What was found" in page


def test_a_model_that_is_there(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = saved_model(tmp_path / "other", seed=1, num_hidden_layers=2, initializer_range=0.3)
    text = write(tmp_path, "prose")
    shape = ["--text-samples", "4", "--text-length", "12", "--quiet"]
    assert command("--pretrained", model, "--compressed", other, "--text", text, *shape) == 0
    shown = capsys.readouterr().out
    assert "half of all divergence" in shown
    assert "in calibration" not in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "compressed: got neither a recipe and --compressed"),
        (["--compressed", "x"], "text: missing; the text to compare"),
        (["--method", "magnitude", "--sparsity", "0.5"], "`magnitude` uses no calibration text"),
        (["--method", "wnada"], "did you mean `wanda`?"),
        (["--compressed", "x", "--text", "none"], "text: got none"),
        (["--compressed", "x", "--text", "slef"], "text: no source `slef`; did you mean `self`?"),
        (["--compressed", "x", "--text", "c4", "--text", "c4"], "text: c4 is given twice"),
        (["--compressed", "x", "--text", "c4", "--text-fold", "test"], "text-fold: "),
        (["--compressed", "x", "--text", "c4", "--out", "/dev/null"], "out: /dev/null is a file"),
        (["--nsample", "4"], "--nsample: unknown option; did you mean `--nsamples`?"),
    ],
    ids=str,
)
def test_bad_input_loads_nothing(
    arguments: list[str],
    said: str,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loaded(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lm_calib_plugin.diagnostics.pair.load_model", loaded)
    assert command("--pretrained", model, *arguments) == 2
    assert said in capsys.readouterr().err


def test_errors_name_what_was_typed(model: str, tmp_path: Path) -> None:
    text = write(tmp_path, "prose", count=10)
    with pytest.raises(UserError, match=r"^text-length: got 4000; .*use --text-length<=64"):
        ask(model, text, recipe={"calibration": text}, length=4000)
    with pytest.raises(UserError, match=r"^text-samples: .*lower --text-samples or --text-length"):
        ask(model, text, recipe={"calibration": text}, samples=4000)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture(name: str) -> None:
    pair = Pair(make_model(name), make_model(name, seed=1), make_tokenizer(), "a", "b")
    found = compared("text", drawn(random_ids([12, 7, 12, 9, 5])), pair, progress=False)
    assert len(set(found.norms)) == 5
    assert found.related is not None
    assert all(len(part) == size for part, size in zip(found.parts, [11, 6, 11, 8, 4], strict=True))
    assert found.worst[0].js == max(float(part.js.max()) for part in found.parts)
