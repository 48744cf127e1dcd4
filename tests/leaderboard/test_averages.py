"""Columns over tasks, pairs of draws, and records that do not go together."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lm_calib_plugin import comparison
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard.analysis import analyze
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.compared import _adjusted
from lm_calib_plugin.leaderboard.grid import Grid
from lm_calib_plugin.leaderboard.records import Records
from lm_calib_plugin.leaderboard.tables import Analysis, Comparison
from tests.leaderboard.made_up import fill, grid, record_of, result

TASKS = ["quiz", "riddles", "prose"]
ALL = ("quiz", "riddles", "prose", "count")


def said(folder: Path, made: Grid | None = None, lacks: Any = None) -> Analysis:
    made = made or grid(tasks=TASKS)
    return analyze(made, fill(folder, made, lacks), Records(folder))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return said(tmp_path_factory.mktemp("averages"))


def pair(analysis: Analysis, a: str, b: str, column: str, against: str = "baseline") -> Comparison:
    return next(
        c
        for c in analysis.comparisons
        if (c.a, c.b, c.column, c.against)
        == (f"tiny 50% {a}", f"tiny 50% {b}", column, against)
    )  # fmt: skip


def items(cell: Cell, task: str) -> np.ndarray:
    return np.array(result(cell, ALL)[task].metrics["acc"].items)


def cells_by(made: Grid) -> dict[tuple[str, str, int], Cell]:
    from lm_calib_plugin.leaderboard.cells import cells_of

    return {(c.method, c.calibration, c.draw): c for c in cells_of(made) if not c.repeat}


def test_the_error_of_an_average_is_that_of_its_tasks(full: Analysis) -> None:
    cells = cells_by(grid(tasks=TASKS))
    draws = [[items(cells["wanda", "c4", d], task) for task in TASKS[:2]] for d in range(3)]
    score = full.entry("tiny 50% wanda c4").scores["average"]
    assert score.draws == pytest.approx([50 * sum(t.mean() for t in draw) for draw in draws])
    errors = [50 * math.hypot(*(stats.sem(task) for task in draw)) for draw in draws]
    assert score.item_error == pytest.approx(np.mean(errors))


def test_an_average_is_compared_within_its_tasks(full: Analysis) -> None:
    cells = cells_by(grid(tasks=TASKS))
    arms = [
        np.array(
            [
                np.concatenate([items(cells["wanda", c, d], t) for t in TASKS[:2]])
                for d in range(3)
            ]
        )
        for c in ("self", "c4")
    ]  # fmt: skip
    options = {
        "weights": np.repeat([1 / 200, 1 / 50], (200, 50)),
        "strata": np.repeat([0, 1], (200, 50)),
    }
    found = pair(full, "wanda self", "wanda c4", "average")
    delta = comparison.two_level_bootstrap(*arms, expanded=True, **options)
    assert (found.delta, found.low, found.high) == pytest.approx(
        (100 * delta.value, 100 * delta.low, 100 * delta.high)
    )
    assert found.p == pytest.approx(comparison.p_value(*arms, **options))
    said = comparison.verdict(*arms, margin=0.02, **options)
    assert found.verdict in (said.kind, said.kind.replace("resolved", "likely"))


def test_draws_of_two_methods_are_paired_by_their_number(tmp_path: Path, full: Analysis) -> None:
    # Two riddles more in every draw, whatever the draw itself does.
    found = pair(full, "sparsegpt c4", "wanda c4", "riddles", "method")
    assert found.delta == pytest.approx(4.0)
    assert found.flips is False
    gone = said(tmp_path, lacks=("sparsegpt", "c4", 0))
    found = pair(gone, "sparsegpt c4", "wanda c4", "riddles", "method")
    assert found.delta == pytest.approx(4.0)
    # Sorted by place instead, draws 1 and 2 would stand beside 0 and 1.
    assert gone.entry("tiny 50% sparsegpt c4").draws == (1, 2)


def test_draws_that_disagree_on_the_winner_are_told(full: Analysis) -> None:
    # -5, -17 and +7 riddles.
    found = pair(full, "wanda self", "wanda c4", "riddles")
    assert found.delta == pytest.approx(100 * (-5 - 17 + 7) / 3 / 50)
    assert found.flips is True
    assert pair(full, "wanda self", "wanda c4", "quiz").flips is False
    one = next(c for c in full.comparisons if c.against == "dense" and "magnitude" in c.a)
    assert one.flips is None


def test_comparisons_stand_by_pair_then_column(full: Analysis) -> None:
    order = [(c.against, c.a, c.b) for c in full.comparisons]
    assert [key for key, _ in itertools.groupby(order)] == list(dict.fromkeys(order))
    columns = [c.column for c in full.comparisons]
    assert columns == [c.task for c in full.columns] * (len(columns) // len(full.columns))


def test_tasks_that_rank_the_other_way_round_disagree(full: Analysis) -> None:
    found = next(a for a in full.agreements if (a.fixed, a.over) == ("wanda", "tasks"))
    assert found.names == ("quiz", "riddles", "prose")
    assert found.taus == ((1, -1, 1), (-1, 1, -1), (1, -1, 1))
    assert not [a for a in full.agreements if a.over == "levels"]


def test_levels_are_held_against_each_other(tmp_path: Path) -> None:
    analysis = said(tmp_path, grid(levels=["50%", "60%"], tasks=["quiz"], draws=2))
    (one, _) = [a for a in analysis.agreements if a.over == "levels"]
    assert (one.level, one.names, one.taus) == ("", ("50%", "60%"), ((1, 1), (1, 1)))


def test_one_draw_ranks_nothing(tmp_path: Path) -> None:
    assert said(tmp_path, grid(draws=1)).rankings == ()


def test_margins_are_of_points_and_perplexities_only(tmp_path: Path) -> None:
    made = grid()
    cells = fill(tmp_path, made)
    for cell in cells:
        tasks = result(cell)
        metric = tasks["count"].metrics["bleu"]
        value = 40.0 + 0.001 * (cell.calibration == "self") + 0.0001 * cell.draw
        value = 40.0 if cell.role in ("dense", "data-free") else value
        metric = dataclasses.replace(metric, value=value)
        tasks["count"] = dataclasses.replace(tasks["count"], metrics={"bleu": metric})
        Records(tmp_path).write(record_of(cell, tasks=tasks))
    found = analyze(made, cells, Records(tmp_path)).comparisons
    assert not [c for c in found if c.column == "count" and "apart" in c.words]


def with_metric(folder: Path, task: str, **changes: Any) -> Analysis:
    """Return what is said when one record has another metric."""
    made = grid()
    cells = fill(folder, made)
    cell = next(c for c in cells if (c.method, c.calibration, c.draw) == ("wanda", "self", 1))
    tasks = result(cell)
    name, metric = next(iter(tasks[task].metrics.items()))
    tasks[task] = dataclasses.replace(
        tasks[task], metrics={name: dataclasses.replace(metric, **changes)}
    )
    Records(folder).write(record_of(cell, tasks=tasks))
    return analyze(made, cells, Records(folder))


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("quiz", {"items": None}, "does not say how"),
        ("prose", {"items": None, "form": "mean"}, "does not say how"),
        ("quiz", {"items": [1.0, 0.0]}, "has 2 items"),
        ("prose", {"weights": None, "value": 12.0}, "in another way"),
        ("prose", {"form": "mean", "value": 3.0}, "in another way"),
        ("quiz", {"value": 0.9, "weights": [1.0] * 199 + [9.0]}, "in another way"),
    ],
)
def test_records_with_other_items_are_refused_by_name(
    tmp_path: Path, task: str, changes: Any, words: str
) -> None:
    with pytest.raises(UserError, match=rf"self.*{words}.* in {task}"):
        with_metric(tmp_path, task, **changes)


def test_equal_items_may_have_been_taken_for_another_form(tmp_path: Path) -> None:
    # Every weight gives the same score then.
    found = with_metric(
        tmp_path, "prose", items=[0.5] * 20, weights=None, value=math.exp(0.5)
    ).entry("tiny 50% wanda self")
    assert found.scores["prose"].draws[1] == pytest.approx(math.exp(0.5))


def test_nothing_is_resolved_that_holm_does_not_resolve() -> None:
    def one(p: float | None, verdict: str, words: str) -> Comparison:
        return Comparison(
            "a", "b", "dense", "quiz", "points", 1.0, 0.1, 2.0, 0.0, 0.0, p, None, 1.0,
            verdict, words, 0,
        )  # fmt: skip

    found = _adjusted(
        [
            one(0.001, "resolved_better", "resolved, better: +1 points"),
            one(0.04, "resolved_worse", "resolved, worse: -1 points"),
            one(0.04, "better_on_average", "better on average only: +1 points"),
            one(None, "no_spread", "nothing"),
            one(0.5, "coin_flip", "a coin flip"),
        ]
    )
    assert [c.verdict for c in found] == [
        "resolved_better", "likely_worse", "better_on_average", "no_spread", "coin_flip",
    ]  # fmt: skip
    over = "not resolved after Holm over 4 comparisons (p = 0.12)"
    assert found[1].words == f"likely worse, {over}: -1 points"
    assert found[2].words == f"better on average only: +1 points; {over}"
    assert [c.more_draws for c in found] == [0, None, None, 0, 0]
    assert [found[n].words for n in (0, 3, 4)] == [
        "resolved, better: +1 points", "nothing", "a coin flip",
    ]  # fmt: skip
