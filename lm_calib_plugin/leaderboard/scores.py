"""From the samples of the harness to the values of items, checked against its own score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_calib_plugin.errors import CalibError, UserError, listed
from lm_calib_plugin.leaderboard.records import EXPONENTIAL, MEAN, Metric, TaskResult
from lm_calib_plugin.storage import digest

# The score must be that of the harness to this relative error, else it is not understood.
TOLERANCE = 1e-6
# Metrics whose items are log likelihoods with the words or bytes that they are divided by.
ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def task_result(
    leaves: Sequence[str], results: Mapping[str, Any], name: str, choices: bool
) -> TaskResult:
    """Gather one task, or a group of tasks, out of what ``simple_evaluate`` returned.

    Parameters
    ----------
    leaves
        Names of the tasks it consists of; itself, for a task.
    results
        What ``simple_evaluate(log_samples=True)`` returned.
    name
        The name that was asked for.
    choices
        Whether items are choices between answers, so that guessing has a score.

    Raises
    ------
    UserError
        For a group without a score of its own.
    CalibError
        When a score is infinite or not a number.
    """
    scores = results.get("groups", {}).get(name) or results["results"].get(name, {})
    samples = {leaf: results["samples"][leaf] for leaf in leaves}
    metrics = {}
    for label, value in scores.items():
        metric, _, rule = label.partition(",")
        if not rule or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            raise CalibError(f"{name}: {label} is {value}: the model is broken, or the task is.")
        own = [_of_rule(samples[leaf], rule) for leaf in leaves]
        found = _items(metric, [[s.get(metric) for s in part] for part in own], float(value))
        better = results.get("higher_is_better", {}).get(leaves[0], {}).get(metric)
        error = scores.get(f"{metric}_stderr,{rule}")
        # Several filters of one metric keep their names.
        key = metric if rule == "none" else label
        metrics[key] = Metric(
            float(value),
            better is not False,
            *found,
            stderr=float(error) if isinstance(error, (int, float)) else None,
        )
    if not metrics:
        raise no_score(name, leaves)
    first = [_of_rule(part, part[0]["filter"]) for part in samples.values()]
    asked = [
        [s["doc_id"], s["doc_hash"], s["prompt_hash"], s["target_hash"]]
        for part in first
        for s in part
    ]
    guesses = [1 / _choices(s) for part in first for s in part]
    return TaskResult(
        version=",".join(sorted({str(results["versions"].get(leaf)) for leaf in leaves})),
        n_shot=max((results["n-shot"].get(leaf) or 0 for leaf in leaves), default=0),
        hash=digest([results.get("task_hashes", {}).get(leaf) for leaf in leaves]),
        items_digest=digest(asked),
        items=len(asked),
        chance=sum(guesses) / len(guesses) if choices and guesses else None,
        metrics=metrics,
    )


def no_score(name: str, leaves: Sequence[str]) -> UserError:
    """Return the error for a group, or a tag, that only its tasks have scores of."""
    return UserError(
        "tasks",
        f"{name} has no score of its own",
        "tasks, and groups with aggregate_metric_list",
        f"name its tasks instead: {listed(leaves)}",
    )


def _choices(sample: Mapping[str, Any]) -> int:
    """Return between how many answers an item chooses."""
    asked = len(sample["arguments"])
    # There every answer is asked for without the question, too.
    return asked // 2 if "acc_mutual_info" in sample["metrics"] else asked


def _of_rule(samples: Sequence[Mapping[str, Any]], rule: str) -> list[Mapping[str, Any]]:
    """Return the samples of one filter by the number of their item."""
    return sorted((s for s in samples if s["filter"] == rule), key=lambda s: s["doc_id"])


def _items(
    metric: str, parts: Sequence[Sequence[Any]], value: float
) -> tuple[str, list[float] | None, list[float] | None]:
    """Return form, values and weights that give the score; no values where none do.

    ``parts`` holds what the harness noted for each item, task by task.
    """
    noted = [x for part in parts for x in part]
    if not noted or not math.isfinite(value):
        return MEAN, None, None
    if all(isinstance(x, (int, float)) and math.isfinite(x) for x in noted):
        values = [float(x) for x in noted]
        # All items alike; all tasks of a group alike; perplexity of single answers.
        alike = [1 / len(part) for part in parts for _ in part]
        for form, items, weights in (
            (MEAN, values, None),
            (MEAN, values, alike),
            (EXPONENTIAL, [-x for x in values], None),
        ):
            if gives(form, items, weights, value):
                return form, items, weights
    # Pairs of other metrics (f1, mcc) are answers and truth.
    if metric in ROLLING and all(isinstance(x, (tuple, list)) and len(x) == 2 for x in noted):
        weights = [float(x[1]) for x in noted]
        nats = [-float(x[0]) / max(float(x[1]), 1e-9) for x in noted]
        bits = [x / math.log(2) for x in nats]
        for form, items in ((EXPONENTIAL, nats), (MEAN, bits)):
            if gives(form, items, weights, value):
                return form, items, weights
    return MEAN, None, None


def score_of(form: str, items: Sequence[float], weights: Sequence[float] | None) -> float:
    """Return the score that items make."""
    if weights is None:
        mean = math.fsum(items) / len(items)
    else:
        products = (x * w for x, w in zip(items, weights, strict=True))
        mean = math.fsum(products) / math.fsum(weights)
    try:
        return math.exp(mean) if form == EXPONENTIAL else mean
    except OverflowError:
        return math.inf


def gives(form: str, items: Sequence[float], weights: Sequence[float] | None, value: float) -> bool:
    """Tell whether items make a score."""
    return math.isclose(score_of(form, items, weights), value, rel_tol=TOLERANCE, abs_tol=1e-12)
