"""Calibration of answers: by hand, by brute force, and from files of the harness itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from lm_calib_plugin import cli
from lm_calib_plugin.diagnostics.answers import (
    Answers,
    bins_of,
    calibration_error,
    compare,
    equal_mass,
    matched,
    pooled,
    read_answers,
    reliability,
)
from lm_calib_plugin.diagnostics.samples import Item, read_tasks
from lm_calib_plugin.errors import UserError
from tests.harness.test_models import task  # noqa: F401
from tests.tiny import saved_model


def items(rows: list[tuple[list[float], int]]) -> list[Item]:
    """Return items of these probabilities of the answers, and the right one."""
    return [
        Item(number, tuple(math.log(p) for p in shares), gold, (len(shares),))
        for number, (shares, gold) in enumerate(rows)
    ]


def sample(number: int, likelihoods: list[float], target: Any, **more: Any) -> dict[str, Any]:
    return {
        "doc_id": number,
        "doc": {},
        "target": target,
        "arguments": {
            f"gen_args_{i}": {"arg_0": "q", "arg_1": f" {chr(97 + i)}"}
            for i in range(len(likelihoods))
        },
        "resps": [[[str(value), "False"]] for value in likelihoods],
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": f"h{number}",
        "prompt_hash": "p",
        "target_hash": "t",
        **more,
    }


def write(folder: Path, samples: list[Any], task: str = "t", time: str = "") -> Path:  # noqa: F811
    folder.mkdir(exist_ok=True)
    file = folder / f"samples_{task}{time}.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in samples))
    return file


def test_by_hand() -> None:
    """Ten bins: 0.9 and 0.85 of one right, 0.3 (of four) wrong."""
    rows = [([0.9, 0.1], 0), ([0.15, 0.85], 0), ([0.3, 0.25, 0.25, 0.2], 2)]
    found = matched("t", items(rows), items(rows))
    np.testing.assert_allclose(found.confidence[0], [0.9, 0.85, 0.3])
    assert found.correct[0].tolist() == [1, 0, 0]
    np.testing.assert_allclose(found.brier[0], [0.02, 1.445, 0.09 + 0.0625 + 0.5625 + 0.04])
    row = compare(found, 10)
    # 0.9 and 0.85 share the bin of 0.8 to 0.9: accuracy 1/2, confidence 0.875.
    assert row["dense"]["ece"] == pytest.approx(2 / 3 * 0.375 + 1 / 3 * 0.3)
    assert row["dense"]["accuracy"] == pytest.approx(1 / 3)
    assert row["dense"]["confidence"] == pytest.approx(2.05 / 3)
    bins = row["dense"]["reliability"]
    assert [(b["from"], b["items"]) for b in bins] == [(0.2, 1), (0.8, 2)]
    assert bins[1]["accuracy"] == 0.5
    assert bins[1]["confidence"] == pytest.approx(0.875)
    # Equal mass with three bins is each item alone: gaps of 0.1, 0.85 and 0.3.
    assert compare(found, 3)["dense"]["ece_equal_mass"] == pytest.approx((0.1 + 0.85 + 0.3) / 3)


def test_edges_of_bins_belong_to_the_lower_one() -> None:
    assert bins_of(np.array([0.0, 0.1, 0.1000001, 0.5, 1.0]), 10).tolist() == [0, 0, 1, 4, 9]
    mass = equal_mass(np.array([0.5, 0.1, 0.9, 0.3, 0.7]), 2)
    assert mass.tolist() == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_as_brute_force(bins: int) -> None:
    generator = np.random.default_rng(bins)
    confidence = generator.uniform(0.2, 1, 300)
    correct = (generator.uniform(size=300) < confidence**2).astype(float)
    naive = 0.0
    for number in range(bins):
        inside = [
            i for i, value in enumerate(confidence) if number / bins < value <= (number + 1) / bins
        ]
        if inside:
            naive += len(inside) / 300 * abs(correct[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, correct, bins_of(confidence, bins)) == pytest.approx(naive)
    rows = reliability(confidence, correct, bins)
    told = sum(r["items"] / 300 * abs(r["accuracy"] - r["confidence"]) for r in rows)
    assert told == pytest.approx(naive)


def planted(seed: int, sharper: float, count: int = 400) -> Answers:
    """A model that is as sure as it is right, and one whose log-likelihoods are stretched."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1.5, (count, 4))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gold = [int(generator.choice(4, p=row)) for row in shares]
    pair = [
        [Item(i, tuple(scale * row), gold[i], ()) for i, row in enumerate(logits)]
        for scale in (1.0, sharper)
    ]
    return matched("planted", *pair)


def test_a_planted_overconfidence_is_found() -> None:
    row = compare(planted(0, 3.0))
    assert row["changed"] == 0
    assert row["ece_change"]["low"] > 0.05
    assert row["dense"]["ece"] < 0.08 < row["compressed"]["ece"]
    assert row["compressed"]["confidence"] > row["compressed"]["accuracy"] + 0.05
    assert row["accuracy_change"] == {"value": 0, "low": 0, "high": 0}
    assert row["brier_change"]["low"] > 0


def test_the_interval_is_that_of_items_taken_again() -> None:
    answers = planted(1, 2.0, 150)
    row = compare(answers, 10)
    generator = np.random.default_rng(5)
    gaps = []
    for _ in range(3000):
        taken = generator.integers(150, size=150)
        both = [
            calibration_error(c[taken], r[taken], bins_of(c[taken], 10))
            for c, r in zip(answers.confidence, answers.correct, strict=True)
        ]
        gaps.append(both[1] - both[0])
    low, high = np.quantile(gaps, [0.025, 0.975])
    assert row["ece_change"]["low"] == pytest.approx(low, abs=0.1 * (high - low))
    assert row["ece_change"]["high"] == pytest.approx(high, abs=0.1 * (high - low))
    assert compare(answers, 10) == row


def test_equal_models_differ_by_exactly_nothing() -> None:
    row = compare(planted(2, 1.0))
    for name in ("ece", "accuracy", "confidence", "brier"):
        assert set(row[f"{name}_change"].values()) == {0.0}
    assert row["dense"] == row["compressed"]


def test_what_can_not_be_compared_is_counted() -> None:
    good = ([0.6, 0.4], 0)
    dense = items([good] * 6)
    other = list(dense)
    other[1] = Item(1, other[1].likelihoods, 0, ("another prompt",))
    dense[2] = other[2] = Item(2, (-1.0,), 0, ())
    dense[3] = other[3] = Item(3, (-1.0, -2.0), None, ())
    other[4] = Item(4, (-1.0, math.nan), 0, other[4].asked)
    found = matched("t", dense, other[:5])
    assert found.items == 1
    assert set(found.left.values()) == {1}
    assert len(found.left) == 5
    both = pooled([found, matched("u", dense[:1], other[:1])])
    assert (both.items, both.task) == (2, "all tasks")
    assert both.left == found.left


def test_right_answers_in_every_form(tmp_path: Path) -> None:
    likelihoods = [-1.0, -2.0, -0.5]
    rows = [
        (sample(0, likelihoods, "2", acc=1.0), 2),
        (sample(1, likelihoods, 1, acc=0.0), 1),
        (sample(2, likelihoods, " b", acc=0.0), 1),
        # Told wrong: the harness found its best answer right.
        (sample(3, likelihoods, "0", acc=1.0), None),
        (sample(4, likelihoods, ["a", "b"], acc=1.0), None),
        # Of two answers, the accuracy tells which is right.
        (sample(5, [-1.0, -2.0], "all of it", acc=0.0), 1),
        (sample(6, [-1.0, -2.0], "all of it", acc=1.0), 0),
        (sample(7, [-1.0, -2.0], "all of it"), None),
        (sample(8, [-1.0], "a"), None),
        (sample(9, [-1.0, -2.0, -9.0, -8.0], "0", metrics=["acc", "acc_mutual_info"]), 0),
    ]
    read = read_tasks(write(tmp_path / "a", [row for row, _ in rows]), "DENSE")["t"]
    assert [item.gold for item in read] == [gold for _, gold in rows]
    assert read[9].likelihoods == (-1.0, -2.0)
    assert read[8].likelihoods == ()
    old = sample(0, [-1.0, -2.0], "1", arguments=[["q", " a"], ["q", " b"]])
    assert read_tasks(write(tmp_path / "b", [old]), "DENSE")["t"][0].gold == 1


def test_the_newest_of_several_runs_and_one_line_a_filter(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write(folder, [sample(0, [-1.0, -2.0], "0")], time="_2026-01-02T03-04-05.600000")
    new = [sample(0, [-3.0, -2.0], "0"), sample(0, [-3.0, -2.0], "0", filter="other")]
    write(folder, new, time="_2026-01-03T03-04-05.600000")
    write(folder, [sample(0, [-3.0, -2.0], "0")], task="my_task_2")
    found = read_tasks(folder, "DENSE")
    assert set(found) == {"t", "my_task_2"}
    assert [item.likelihoods for item in found["t"]] == [(-3.0, -2.0)]


GOOD = sample(0, [-1.0, -2.0], "0")


@pytest.mark.parametrize(
    "content",
    [
        '{"doc_id": 0',
        "[1, 2]",
        "7",
        "{}",
        json.dumps({**GOOD, "resps": [[["x", "False"]], [["-1", "False"]]]}),
        json.dumps({**GOOD, "resps": [[["-1", "False"]]]}),
        json.dumps({**GOOD, "resps": 3}),
        json.dumps({**GOOD, "arguments": {"a": 1}}),
        json.dumps({**GOOD, "arguments": None}),
        json.dumps({**GOOD, "doc_id": "x"}),
        json.dumps({**GOOD, "resps": [[], []]}),
        "[" * 100_000,
        json.dumps(GOOD)[:-20] + "\n" + json.dumps(GOOD),
        b"\xff\xfe",
        json.dumps(GOOD) + "\n" + json.dumps(GOOD),
    ],
    ids=lambda content: str(content)[:40],
)
def test_damaged_files_say_where(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "samples_t.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_tasks(tmp_path, "DENSE")
    assert str(caught.value).startswith("DENSE: ")
    assert "samples_t.jsonl" in str(caught.value)


def test_nothing_in_common(tmp_path: Path) -> None:
    one = write(tmp_path / "a", [GOOD])
    other = write(tmp_path / "b", [GOOD], task="u")
    with pytest.raises(UserError, match="COMPRESSED: holds u; DENSE holds t"):
        read_answers(one, other)
    alone = write(tmp_path / "c", [sample(0, [-1.0], "0")])
    with pytest.raises(UserError, match="1 no choice between answers"):
        read_answers(alone, alone)
    with pytest.raises(UserError, match="does not exist"):
        read_answers(tmp_path / "nowhere", one)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--log_samples"):
        read_answers(tmp_path / "empty", one)


def test_from_the_harness_to_the_page(
    task: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is read from files is what the harness says, and the plain numbers say."""
    folders, scores, raw = [], [], []
    for seed in (0, 1):
        model = saved_model(tmp_path / f"model{seed}", seed=seed, initializer_range=0.3)
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": model},
            tasks=["tiny_choice"],
            task_manager=TaskManager(include_path=str(task), include_defaults=False),
            device="cpu",
            bootstrap_iters=0,
            log_samples=True,
        )
        out = tmp_path / f"out{seed}"
        tracker = EvaluationTracker(output_path=str(out))
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        tracker.save_results_samples(task_name="tiny_choice", samples=samples["tiny_choice"])
        folders.append(str(out))
        scores.append(results["results"]["tiny_choice"]["acc,none"])
        raw.append([[float(r[0][0]) for r in s["resps"]] for s in samples["tiny_choice"]])
    out = tmp_path / "report"
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", "answers", *folders, "--bins", "10", "--out", str(out)])
    assert not end.value.code
    assert "* tiny_choice: " in capsys.readouterr().out
    data = json.loads((out / "answers.json").read_text())["tasks"]["tiny_choice"]
    assert (data["items"], data["left"]) == (8, {})
    for number, name in enumerate(("dense", "compressed")):
        shares = [np.exp(row) / np.exp(row).sum() for row in np.array(raw[number], float)]
        assert data[name]["accuracy"] == scores[number]
        assert data[name]["confidence"] == pytest.approx(np.mean([max(s) for s in shares]))
    best = [[int(np.argmax(row)) for row in model] for model in raw]
    assert data["changed"] == sum(a != b for a, b in zip(*best, strict=True))
    assert (out / "answers-reliability-tiny-choice.png").is_file()
    assert (out / "answers.html").read_text().count("<figure>") == 1


def test_without_torch() -> None:
    """Files are read and compared without loading what runs models."""
    import subprocess
    import sys

    code = (
        "import sys; import lm_calib_plugin.diagnostics.answers_report; "
        "print([m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr
