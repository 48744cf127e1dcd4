"""How much of the dense model's ability is left, domain by domain."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from lm_calib_plugin.comparison.numbers import finite
from lm_calib_plugin.errors import UserError

CLIP = (-0.2, 1.2)


@dataclass(frozen=True)
class Retention:
    """What is left of the dense model's distance from chance: 1 is all, 0 is chance.

    Compare ``worst`` first, then ``geometric_mean`` (0 as soon as one domain is not above
    chance); the plain ``mean`` last.
    """

    worst_domain: str
    worst: float
    geometric_mean: float
    mean: float
    domains: Mapping[str, float]


def retention(
    scores: Mapping[str, float],
    dense: Mapping[str, float],
    chance: Mapping[str, float] | None = None,
) -> Retention:
    """Return ``(score - chance) / (dense - chance)`` of every domain, and what sums them up.

    Parameters
    ----------
    scores, dense
        Domain -> score of the compressed and of the dense model, higher is better.
    chance
        Domain -> score of guessing; 0 where none is given. Values are clipped to [-0.2, 1.2].

    Raises
    ------
    UserError
        When a domain is missing or the dense model is not above chance.
    """
    if not scores or set(scores) != set(dense):
        odd = sorted(set(scores) ^ set(dense))
        raise UserError("scores", f"domains differ: {odd}", "score every domain of both models")
    found = {}
    for domain, score in scores.items():
        floor = (chance or {}).get(domain, 0.0)
        values = finite(domain, [score, dense[domain], floor], 1)
        if not values[1] > values[2]:
            raise UserError(
                "dense",
                f"{domain}: the dense model scores {dense[domain]}, chance is {floor}",
                "nothing above chance can be retained",
                "leave this domain out",
            )
        found[domain] = float(np.clip((values[0] - floor) / (values[1] - floor), *CLIP))
    ratios = np.array(list(found.values()))
    worst = min(found, key=lambda domain: found[domain])
    geometric = float(np.exp(np.log(ratios).mean())) if (ratios > 0).all() else 0.0
    return Retention(worst, found[worst], geometric, float(ratios.mean()), found)


@dataclass(frozen=True)
class Recovery:
    """Score over the dense model's score: what other tools call recovery (0.95 is 95 %).

    It flatters: a task at chance level still recovers a good part. See :class:`Retention`.
    """

    mean: float
    worst_task: str
    worst: float
    tasks: Mapping[str, float]


def recovery(
    scores: Mapping[str, float], dense: Mapping[str, float], lower_is_better: Collection[str] = ()
) -> Recovery:
    """Return ``score / dense`` of every task and the mean over tasks, not clipped.

    Parameters
    ----------
    scores, dense
        Task -> score of the compressed and of the dense model, above 0 where it is divided by.
    lower_is_better
        Tasks, of those given, where less is better (perplexity): ``dense / score``.

    Raises
    ------
    UserError
        When a task is missing, or there is nothing to divide by.
    """
    if not scores or set(scores) != set(dense) or not set(lower_is_better) <= set(scores):
        odd = sorted((set(scores) ^ set(dense)) | (set(lower_is_better) - set(scores)))
        raise UserError("scores", f"tasks differ: {odd}", "score every task of both models")
    found = {}
    for task, score in scores.items():
        above, below = finite(task, [score, dense[task]], 1)
        if task in lower_is_better:
            above, below = below, above
        if not below > 0:
            raise UserError(
                "scores" if task in lower_is_better else "dense",
                f"{task}: {below:g}",
                "recovery divides by it: a number above 0 is needed",
                "leave this task out",
            )
        found[task] = float(above / below)
    worst = min(found, key=lambda task: found[task])
    return Recovery(float(np.mean(list(found.values()))), worst, found[worst], found)
