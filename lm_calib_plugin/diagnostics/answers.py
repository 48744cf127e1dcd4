"""How sure a model is of its answers, and how often it is right: dense against compressed.

Read from what ``lm_eval --log_samples`` writes, so no model is needed. The confidence of an answer
is its share of the probability of all answers of the item (the softmax of the summed
log-likelihoods, as the metric ``acc`` ranks them). Expected calibration error after Guo et al.
(arXiv 1706.04599); Brier score: the sum over answers of the squared gap between probability and
truth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_calib_plugin.comparison import Interval, Resampling
from lm_calib_plugin.comparison.numbers import Array, percentile_interval
from lm_calib_plugin.diagnostics.samples import Item, read_tasks
from lm_calib_plugin.errors import UserError

BINS = 15
ALL = "all tasks"
# Why an item is not counted.
NO_CHOICE = "no choice between answers"
NO_GOLD = "the right answer is not told"
NO_NUMBER = "log-likelihoods that are not finite"
ONE_SIDE = "only in one of the two"
OTHERWISE = "asked otherwise in the two"


@dataclass(frozen=True)
class Answers:
    """Answers to the same items by both models; the first axis is dense, compressed.

    ``confidence`` and ``correct`` of the best answer, ``brier`` score and ``choice``,
    ``[2, items]``; ``left`` counts the items that are not there, by reason.
    """

    task: str
    confidence: Array
    correct: Array
    brier: Array
    choice: NDArray[np.int64]
    left: Mapping[str, int]

    @property
    def items(self) -> int:
        """How many there are."""
        return int(self.confidence.shape[1])

    @property
    def changed(self) -> int:
        """Items whose best answer is another one."""
        return int((self.choice[0] != self.choice[1]).sum())


def read_answers(dense: Path, compressed: Path) -> list[Answers]:
    """Return the answers of each task that stands in both, by name.

    Parameters
    ----------
    dense, compressed
        A file ``samples_TASK_TIME.jsonl``, or a folder that holds such files; of several of one
        task the newest.

    Raises
    ------
    UserError
        For files that are none, or damaged, and when the two have no item in common.
    """
    both = [read_tasks(path, name) for name, path in (("DENSE", dense), ("COMPRESSED", compressed))]
    names = sorted(both[0].keys() & both[1].keys())
    if not names:
        raise UserError(
            "COMPRESSED",
            f"holds {', '.join(sorted(both[1]))}; DENSE holds {', '.join(sorted(both[0]))}",
            "samples of the same tasks",
            "evaluate both models with --tasks of the same names and --log_samples",
        )
    found = [matched(name, both[0][name], both[1][name]) for name in names]
    if not any(one.items for one in found):
        reasons = sum((Counter(one.left) for one in found), Counter())
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise UserError(
            "COMPRESSED",
            f"no item of {', '.join(names)} can be compared: {told}",
            "multiple-choice tasks, answered by both models",
            "for instance --tasks arc_easy, with the same --num_fewshot and --limit",
        )
    return found


def matched(task: str, dense: Sequence[Item], compressed: Sequence[Item]) -> Answers:
    """Match the items of a task by their number, and count those that can not be compared."""
    left: Counter[str] = Counter()
    other = {item.doc_id: item for item in compressed}
    left[ONE_SIDE] = len({item.doc_id for item in dense} ^ other.keys())
    rows: list[list[tuple[float, bool, float, int]]] = []
    for item in dense:
        pair = (item, other.get(item.doc_id))
        if pair[1] is None:
            continue
        reason = _reason(pair[0], pair[1])
        if reason:
            left[reason] += 1
        else:
            rows.append([_answer(one) for one in pair if one is not None])
    table = np.array(rows, dtype=np.float64).reshape(len(rows), 2, 4).transpose(2, 1, 0)
    choice = table[3].astype(np.int64)
    told = {reason: count for reason, count in left.items() if count}
    return Answers(task, table[0], table[1], table[2], choice, told)


def pooled(tasks: Sequence[Answers]) -> Answers:
    """Return all items of several tasks as one, each counting alike."""
    left: Counter[str] = Counter()
    for task in tasks:
        left.update(task.left)
    arrays = [
        np.concatenate([getattr(task, name) for task in tasks], 1)
        for name in ("confidence", "correct", "brier", "choice")
    ]
    return Answers(ALL, *arrays, dict(left))


def bins_of(confidence: Array, bins: int) -> NDArray[np.int64]:
    """Return the bin of each answer: ``bins`` equal parts of 0 to 1, upper ends included."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def equal_mass(confidence: Array, bins: int) -> NDArray[np.int64]:
    """Return the bin of each answer: by rising confidence, as many in each as can be."""
    found = np.empty(len(confidence), np.int64)
    for number, part in enumerate(np.array_split(np.argsort(confidence, kind="stable"), bins)):
        found[part] = number
    return found


def calibration_error(confidence: Array, correct: Array, bins: NDArray[np.int64]) -> float:
    """Return the ECE: over bins, the mean gap of accuracy and confidence, by share of items.

    Parameters
    ----------
    confidence, correct
        ``[items]``.
    bins
        The bin of each item.
    """
    gaps = np.bincount(bins, correct - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def compare(answers: Answers, bins: int = BINS) -> dict[str, Any]:
    """Return what is told of a task, for both models, and the differences with their intervals.

    Intervals: 95 % bootstrap over items, the same items for both models; bins of equal width.
    """
    both = range(2)
    confidence, correct = answers.confidence, answers.correct
    own = [bins_of(confidence[i], bins) for i in both]
    found: dict[str, Any] = {"items": answers.items, "changed": answers.changed}
    for i, name in enumerate(("dense", "compressed")):
        mass = equal_mass(confidence[i], min(bins, answers.items))
        found[name] = {
            "ece": calibration_error(confidence[i], correct[i], own[i]),
            "ece_equal_mass": calibration_error(confidence[i], correct[i], mass),
            "accuracy": float(correct[i].mean()),
            "confidence": float(confidence[i].mean()),
            "brier": float(answers.brier[i].mean()),
            "reliability": reliability(confidence[i], correct[i], bins),
        }
    resampling = Resampling(1, answers.items)
    gaps = [_by_bin(correct[i] - confidence[i], own[i], bins) for i in both]
    drawn = np.concatenate(
        [
            np.abs(taken @ gaps[1]).sum(1) - np.abs(taken @ gaps[0]).sum(1)
            for _, taken in resampling.parts()
        ]
    )
    change = found["compressed"]["ece"] - found["dense"]["ece"]
    found["ece_change"] = _ends(percentile_interval(change, drawn))
    for name, values in (
        ("accuracy", correct),
        ("confidence", confidence),
        ("brier", answers.brier),
    ):
        gap = (values[1] - values[0])[None]
        scores = resampling.scores([gap])[0]
        found[f"{name}_change"] = _ends(resampling.interval(float(gap.mean()), scores))
    found["left"] = dict(answers.left)
    return found


def reliability(confidence: Array, correct: Array, bins: int) -> list[dict[str, Any]]:
    """Return items, mean confidence and accuracy of each bin of equal width that holds any."""
    own = bins_of(confidence, bins)
    return [
        {
            "from": number / bins,
            "to": (number + 1) / bins,
            "items": int((own == number).sum()),
            "confidence": float(confidence[own == number].mean()),
            "accuracy": float(correct[own == number].mean()),
        }
        for number in np.unique(own).tolist()
    ]


def _by_bin(values: Array, own: NDArray[np.int64], bins: int) -> Array:
    """Return values ``[items, bins]``, each in the column of its bin."""
    table = np.zeros((len(values), bins))
    table[np.arange(len(values)), own] = values
    return table


def _reason(dense: Item, compressed: Item) -> str:
    """Return why two items can not be compared; nothing when they can."""
    pair = (dense, compressed)
    if dense.asked != compressed.asked:
        return OTHERWISE
    if any(len(item.likelihoods) < 2 for item in pair):
        return NO_CHOICE
    if not all(math.isfinite(value) for item in pair for value in item.likelihoods):
        return NO_NUMBER
    return NO_GOLD if any(item.gold is None for item in pair) else ""


def _answer(item: Item) -> tuple[float, bool, float, int]:
    """Return confidence, whether it is right, Brier score and number of the best answer."""
    values = np.array(item.likelihoods)
    shares = np.exp(values - values.max())
    shares /= shares.sum()
    best = int(values.argmax())
    truth = np.arange(len(values)) == item.gold
    return float(shares[best]), best == item.gold, float(((shares - truth) ** 2).sum()), best


def _ends(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
