"""Outlier channels put in on purpose: nothing changes but what a quantizer sees."""

from __future__ import annotations

import copy
import math
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lm_calib_plugin import Recipe, Runtime, compress
from lm_calib_plugin.diagnostics.outliers import (
    activity_of,
    inject_outliers,
    synthetic_label,
)
from lm_calib_plugin.diagnostics.scoring import nll_of
from lm_calib_plugin.engine.wiring import MAPS
from lm_calib_plugin.errors import UnsupportedModelError, UserError
from tests.tiny import ARCHITECTURES, in_dtype, make_model, make_tokenizer, random_ids, saved_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "fragile_model.py"
TEXT = random_ids([20, 30])
MAPPED = [n for n in ARCHITECTURES if getattr(make_model(n).config, "model_type", "") in MAPS]


@pytest.mark.parametrize("name", MAPPED)
def test_function_stays_and_channels_grow(name: str) -> None:
    model = make_model(name)
    before, ids = activity_of(model, TEXT), torch.stack(random_ids([25, 25], 9))
    with torch.no_grad():
        logits = model(ids).logits
        record = inject_outliers(model, 64, 2, choose="large", feeds="all", text=TEXT)
        assert torch.allclose(model(ids).logits, logits, atol=1e-4 * float(logits.abs().max()))
    after = activity_of(model, TEXT)
    for one in record.injected:
        assert one.factors == (64.0,) * len(one.channels)
        ratio = after[one.source].peak / before[one.source].peak
        grown = (ratio - 64).abs() < 1
        assert (grown | ((ratio - 1).abs() < 1e-2)).all()
        assert grown.sum() >= len(one.channels)
        assert one.widened == pytest.approx(64, rel=1e-2)


@pytest.mark.parametrize("choose", ["random", "large", "bursty", "steady", "specific"])
def test_llama_is_the_same_bit_by_bit(choose: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = in_dtype(make_model("llama"), dtype)
        ids = torch.stack(random_ids([25], 9))
        logits = model(ids).logits
        record = inject_outliers(
            model, 32, choose=choose, feeds="all", text=TEXT, against=random_ids([20], 5)
        )
        assert torch.equal(model(ids).logits, logits)
        assert record.difference == 0


def test_choices_follow_the_activity() -> None:
    seen = activity_of(make_model("llama"), TEXT)
    for choose, best in (
        ("large", lambda a: a.peak),
        ("bursty", lambda a: torch.where(a.peak >= a.peak.median(), a.peak / a.mean, 0)),
        ("steady", lambda a: torch.where(a.peak >= a.peak.median(), a.mean / a.peak, 0)),
    ):
        record = inject_outliers(make_model("llama"), 4, choose=choose, text=TEXT)
        for one in record.injected:
            assert one.channels == (int(best(seen[one.source]).argmax()),)


def test_activity_is_what_hooks_see() -> None:
    model = make_model("llama")
    inputs: list[torch.Tensor] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _m, args: inputs.append(args[0].abs()[0])
    )
    found = activity_of(model, TEXT)["model.layers.1.mlp.up_proj"]
    hook.remove()
    every = torch.cat(inputs).detach()
    assert torch.equal(found.peak, every.amax(0))
    assert torch.allclose(found.mean, every.mean(0))


def test_specific_channels_stay_in_the_range_of_the_other_text() -> None:
    model, other = make_model("llama"), random_ids([40], 7)
    before = activity_of(model, other)
    record = inject_outliers(
        model, 2.0**20, 3, choose="specific", feeds="all", text=TEXT, against=other
    )
    after = activity_of(model, other)
    for one in record.injected:
        assert after[one.source].peak.max() == before[one.source].peak.max()
    assert max(one.widened or 0 for one in record.injected) > 1


def test_equal_seeds_choose_equal_channels() -> None:
    def chosen(seed: int) -> list[Any]:
        made = inject_outliers(make_model("llama"), 4, choose="random", seed=seed)
        return [one.channels for one in made.injected]

    assert chosen(1) == chosen(1) != chosen(2)


def test_label_is_in_the_configuration_and_grows(tmp_path: Path) -> None:
    model = make_model("llama")
    assert synthetic_label(model.config) is None
    first = inject_outliers(model, 4, choose="random")
    second = inject_outliers(model, 2, choose="random", feeds="linear")
    model.save_pretrained(tmp_path)
    label = synthetic_label(AutoConfig.from_pretrained(tmp_path))
    assert label is not None
    assert "Synthetic" in label["note"]
    assert [r["factor"] for r in label["outliers"]] == [first.factor, second.factor]


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"factor": 48}, "factor"),
        ({"factor": 1}, "factor"),
        ({"factor": math.inf}, "factor"),
        ({"channels": 0}, "channels"),
        ({"choose": "burst"}, "choose"),
        ({"feeds": "norms"}, "feeds"),
        ({"choose": "large"}, "text"),
        ({"choose": "specific", "text": TEXT}, "against"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], argument: str) -> None:
    model = make_model("llama")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as error:
        inject_outliers(model, **{"choose": "random", **arguments})
    assert error.value.argument == argument
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_unknown_wiring_is_refused_by_name() -> None:
    model = make_model("llama")
    model.config.model_type = "other"
    with pytest.raises(UnsupportedModelError, match="pretrained.*other"):
        inject_outliers(model, choose="random")


def test_example_writes_a_labeled_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = saved_model(tmp_path / "m")
    out = tmp_path / "out"
    words = [str(EXAMPLE), str(out), "--pretrained", saved, "--seqlen", "16", "--nsamples", "4"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "Synthetic" in (out / "README.md").read_text()
    assert synthetic_label(AutoConfig.from_pretrained(out))
    with pytest.raises(SystemExit, match="not empty"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


# A trained model, and two kinds of text that share no word.


def _written(words: list[str], name: str, count: int) -> str:
    """Return text in which a word follows the two before it, by tables of the name."""
    law, dice = random.Random(f"{name} law"), random.Random(f"{name} dice")
    tables = [{w: [law.choice(words) for _ in range(3)] for w in words} for _ in range(2)]
    found = words[:2]
    while len(found) < count:
        table = tables[words.index(found[-2]) % 2]
        found.append(dice.choices(table[found[-1]], [6, 3, 1])[0])
    return " ".join(found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Llama trained for seconds, files of both kinds of text, and held-out sequences."""
    tokenizer, folder = make_tokenizer(), tmp_path_factory.mktemp("texts")
    pieces = sorted(tokenizer.get_vocab())
    kinds = {
        "words": [p for p in pieces if len(p) > 1 and p.isalpha()],
        "letters": [p for p in pieces if len(p) == 1 and p.isalpha() and p != "a"],
    }
    files, ids = {}, {}
    for name, words in kinds.items():
        text = _written(words, name, 12_000)
        files[name] = folder / f"{name}.txt"
        files[name].write_text(text[: len(text) // 2])
        ids[name] = torch.tensor(tokenizer(text)["input_ids"])
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = make_model(hidden_size=48, intermediate_size=192, num_hidden_layers=2).train()
        steps, optimizer = 250, torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
        for step in range(steps):
            starts = torch.randint(0, 9_000, (2, 8)).tolist()
            rows = [ids[n][s : s + 32] for n, own in zip(kinds, starts, strict=True) for s in own]
            batch = torch.stack(rows)
            optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
            optimizer.zero_grad()
            model(batch, labels=batch).loss.backward()
            optimizer.step()
    model.eval().requires_grad_(True).zero_grad(set_to_none=True)
    held = {n: [own[s : s + 48] for s in range(10_000, 11_900, 100)] for n, own in ids.items()}
    seen = {n: [own[s : s + 48] for s in range(0, 2_000, 100)] for n, own in ids.items()}
    return model, tokenizer, files, held, seen


def _nll(trained: Any, model: Any, kind: str, **recipe: Any) -> float:
    tokenizer, held = trained[1], trained[3]
    if recipe:
        model = copy.deepcopy(model)
        own = {"nsamples": 16, "seqlen": 48} if "calibration" in recipe else {}
        compress(model, tokenizer, Recipe(**recipe, **own), Runtime(progress=False))
    return float(torch.cat(nll_of(model, held[kind], progress=False)).mean())


def test_one_range_breaks_the_fragile_model_and_others_mend(trained: Any) -> None:
    model, _, files, _, seen = trained
    fragile = copy.deepcopy(model)
    inject_outliers(fragile, 256, choose="bursty", text=seen["words"])
    text = f"file:{files['words']}"

    def losses(one: Any) -> list[float]:
        return [
            _nll(trained, one, "words"),
            _nll(trained, one, "words", method="rtn", scheme="W8A8_static", calibration=text),
            _nll(trained, one, "words", method="rtn", scheme="W8A8"),
            _nll(trained, one, "words", method="smoothquant", scheme="W8A8", calibration=text),
            _nll(
                trained, one, "words", method="smoothquant", scheme="W8A8_static", calibration=text
            ),
        ]

    dense, *quantized = losses(model)
    assert max(quantized) - dense < 0.02
    again, static, token, smooth, smooth_static = losses(fragile)
    assert again == dense
    assert static - dense > 0.3
    assert token - dense < 0.6 * (static - dense)
    assert smooth - dense < 0.02
    assert smooth_static - dense < 0.02


def test_what_it_is_calibrated_on_matters_to_the_fragile_model_alone(trained: Any) -> None:
    model, _, files, _, seen = trained
    fragile = copy.deepcopy(model)
    inject_outliers(
        fragile, 4096, 2, choose="specific", feeds="all",
        text=seen["words"], against=seen["letters"],
    )  # fmt: skip

    def static(one: Any, calibration: str) -> float:
        return _nll(
            trained, one, "letters", method="rtn", scheme="W8A8_static", calibration=calibration
        )

    dense = _nll(trained, model, "letters")
    texts = [f"file:{files['letters']}", f"file:{files['words']}", "random"]
    matching, other, nonsense = (static(model, text) - dense for text in texts)
    most = max(abs(matching), abs(other), abs(nonsense))
    assert most < 0.01
    matching, other, nonsense = (static(fragile, text) - dense for text in texts)
    assert abs(matching) < 0.01
    assert min(other, nonsense) > 0.01 + 2 * most
