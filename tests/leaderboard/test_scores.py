"""From samples to values of items: against scores computed by brute force."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.leaderboard.scores import score_of, task_result

RANDOM = random.Random(5)


def sample(
    number: int, notes: dict[str, Any], rule: str = "none", answers: int = 3
) -> dict[str, Any]:
    return {
        "doc_id": number,
        "doc_hash": f"d{number}",
        "prompt_hash": f"p{number}",
        "target_hash": f"t{number}",
        "filter": rule,
        "arguments": [[]] * answers,
        "metrics": list(notes),
        **notes,
    }


def results(leaves: dict[str, list[dict[str, Any]]], scores: dict[str, Any], name: str) -> Any:
    better = {"acc": True, "word_perplexity": False, "perplexity": False}
    return {
        "results": {name: {"alias": name, **scores}},
        "samples": leaves,
        "versions": dict.fromkeys(leaves, 1.0),
        "n-shot": dict.fromkeys(leaves, 2),
        "task_hashes": {leaf: f"hash {leaf}" for leaf in leaves},
        "higher_is_better": {leaf: better for leaf in leaves},
    }


def one(notes: list[Any], metric: str, value: float) -> Any:
    rows = [sample(n, {metric: note}) for n, note in enumerate(notes)]
    RANDOM.shuffle(rows)
    found = task_result(["t"], results({"t": rows}, {f"{metric},none": value}, "t"), "t", True)
    return found.metrics[metric]


def test_a_mean_keeps_its_items_in_their_order() -> None:
    notes = [RANDOM.choice([0.0, 1.0]) for _ in range(23)]
    found = one(notes, "acc", sum(notes) / 23)
    assert (found.form, found.items, found.weights) == ("mean", notes, None)
    assert found.higher_is_better


@pytest.mark.parametrize(
    ("metric", "score"),
    [
        ("word_perplexity", lambda nats, words: math.exp(-sum(nats) / sum(words))),
        ("bits_per_byte", lambda nats, words: -sum(nats) / sum(words) / math.log(2)),
    ],
)
def test_weighted_scores(metric: str, score: Any) -> None:
    words = [RANDOM.randint(1, 40) for _ in range(11)]
    nats = [-RANDOM.random() * 5 * w for w in words]
    value = score(nats, words)
    found = one(list(zip(nats, words, strict=True)), metric, value)
    assert found.weights == [float(w) for w in words]
    again = [x * w for x, w in zip(found.items, words, strict=True)]
    mean = sum(again) / sum(words)
    assert math.isclose(math.exp(mean) if found.form == "exp" else mean, value, rel_tol=1e-9)
    assert found.higher_is_better == (metric != "word_perplexity")


def test_perplexity_of_single_answers() -> None:
    notes = [-RANDOM.random() * 4 for _ in range(9)]
    found = one(notes, "perplexity", math.exp(-sum(notes) / 9))
    assert (found.form, found.items, found.weights) == ("exp", [-x for x in notes], None)


@pytest.mark.parametrize("by_size", [True, False])
def test_groups_of_tasks_of_unequal_size(by_size: bool) -> None:
    parts = {"b": [1.0, 0.0, 0.0, 1.0, 1.0], "a": [0.0, 1.0, 0.0]}
    means = [sum(p) / len(p) for p in parts.values()]
    value = 4 / 8 if by_size else sum(means) / 2
    rows = {
        leaf: [sample(n, {"acc": x}, answers=2 + (leaf == "a")) for n, x in enumerate(part)]
        for leaf, part in parts.items()
    }
    found = task_result(["a", "b"], results(rows, {"acc,none": value}, "g"), "g", True)
    metric = found.metrics["acc"]
    assert metric.items == [*parts["a"], *parts["b"]]
    assert metric.weights == (None if by_size else [1 / 3] * 3 + [1 / 5] * 5)
    assert math.isclose(score_of(metric.form, metric.items, metric.weights), value)
    assert found.items == 8
    assert found.chance is not None
    assert math.isclose(found.chance, (3 / 3 + 5 / 2) / 8)
    assert (found.n_shot, found.version) == (2, "1.0")


def test_other_ways_to_add_up_keep_the_score_alone() -> None:
    found = one([0.0, 1.0, 1.0, 0.0], "f1", 0.77)
    assert (found.value, found.items, found.weights) == (0.77, None, None)
    assert one([["a", "b"], ["c"]], "bleu", 0.3).items is None


def test_filters_of_one_metric_keep_their_names() -> None:
    rows = [sample(n, {"em": float(n == 1)}, "strict") for n in range(2)]
    rows += [sample(n, {"em": 1.0}, "loose") for n in range(2)]
    scores = {"em,strict": 0.5, "em_stderr,strict": 0.25, "em,loose": 1.0, "em_stderr,loose": "N/A"}
    found = task_result(["t"], results({"t": rows}, scores, "t"), "t", False)
    assert found.metrics["em,strict"].items == [0.0, 1.0]
    assert found.metrics["em,strict"].stderr == 0.25
    assert found.metrics["em,loose"].items == [1.0, 1.0]
    assert found.metrics["em,loose"].stderr is None
    assert (found.items, found.chance) == (2, None)


def test_hashes_name_what_was_asked() -> None:
    rows = [sample(n, {"acc": 1.0}) for n in range(3)]

    def found(own: list[dict[str, Any]]) -> Any:
        return task_result(["t"], results({"t": own}, {"acc,none": 1.0}, "t"), "t", True)

    assert found(rows).items_digest == found(rows[::-1]).items_digest
    for name in ("doc_hash", "prompt_hash", "target_hash"):
        other = [*rows[:2], {**rows[2], name: "x"}]
        assert found(other).items_digest != found(rows).items_digest


def test_scores_that_say_nothing_are_errors() -> None:
    rows = {"t": [sample(0, {"acc": 1.0})]}
    for value in (math.inf, math.nan):
        with pytest.raises(CalibError, match="the model is broken, or the task is"):
            task_result(["t"], results(rows, {"acc,none": value}, "t"), "t", True)
    with pytest.raises(UserError, match="no score of its own"):
        task_result(["t"], results(rows, {}, "t"), "t", True)


def test_pairs_of_answer_and_truth_are_no_likelihoods() -> None:
    found = one([(1, 0), (0, 0), (1, 0)], "f1", 0.0)
    assert (found.items, found.weights, found.value) == (None, None, 0.0)


def test_answers_that_are_asked_for_twice_count_once_for_guessing() -> None:
    notes = {"acc": 1.0, "acc_mutual_info": 0.0}
    rows = [sample(n, notes, answers=8) for n in range(4)]
    scores = {"acc,none": 1.0, "acc_mutual_info,none": 0.0}
    assert task_result(["t"], results({"t": rows}, scores, "t"), "t", True).chance == 0.25
