"""What a leaderboard says of made-up records whose answers are known."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard.analysis import analyze
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.gate import read_gates, shortfalls
from lm_calib_plugin.leaderboard.grid import Grid
from lm_calib_plugin.leaderboard.records import FAILED, Records
from lm_calib_plugin.leaderboard.tables import Analysis
from tests.leaderboard.made_up import GRID, ITEMS, fill, grid, record_of, result


def said(folder: Path, made: Grid | None = None) -> Analysis:
    made = made or grid()
    return analyze(made, fill(folder, made), Records(folder))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """Return what is said of all records as they should be."""
    return said(tmp_path_factory.mktemp("full"))


def changed(folder: Path, where: Any, **changes: Any) -> tuple[Grid, list[Cell]]:
    """Write all records, those of some cells with changes."""
    made = grid()
    cells = fill(folder, made)
    for cell in cells:
        if where(cell):
            Records(folder).write(record_of(cell, **changes))
    return made, cells


def test_points_are_means_over_draws_with_their_spread(full: Analysis) -> None:
    row = full.entry("tiny 50% wanda c4")
    score = row.scores["quiz"]
    assert score.draws == pytest.approx((60.0, 61.0, 62.0))
    assert (score.mean, score.sd) == (pytest.approx(61.0), pytest.approx(1.0))
    errors = [math.sqrt(p * (1 - p) / (ITEMS - 1)) for p in (0.60, 0.61, 0.62)]
    assert score.item_error == pytest.approx(100 * np.mean(errors))
    assert score.low is not None
    assert score.low < 61.0 < score.high
    assert row.strength == 0.5
    assert row.leaked == 0.01


def test_perplexities_are_worked_with_as_logarithms(full: Analysis) -> None:
    analysis = full
    dense, wanda = analysis.entry("tiny dense"), analysis.entry("tiny 50% wanda c4")
    column = next(c for c in analysis.columns if c.task == "prose")
    assert (column.unit, column.higher_is_better) == ("perplexity", False)
    each = [math.log(p) for p in wanda.scores["prose"].draws]
    assert wanda.scores["prose"].mean == pytest.approx(math.exp(np.mean(each)))
    delta = next(
        c for c in analysis.comparisons
        if (c.a, c.against, c.column) == (wanda.id, "dense", "prose")
    )  # fmt: skip
    assert delta.delta == pytest.approx(
        100 * (np.mean(each) - math.log(dense.scores["prose"].mean))
    )
    # Higher, and so worse.
    assert (delta.delta > 0, delta.beneficial, delta.harmful) == (True, 0.0, 1.0)
    assert delta.verdict == "resolved_worse"


def test_retention_takes_chance_off_and_leaves_perplexity_out(full: Analysis) -> None:
    kept = full.entry("tiny 50% wanda c4").kept
    assert kept is not None
    assert kept.tasks == {"quiz": pytest.approx((0.61 - 0.25) / (0.9 - 0.25))}
    assert kept.recovery == pytest.approx(0.61 / 0.9)


def test_scores_without_items_have_intervals_over_draws_only(full: Analysis) -> None:
    analysis = full
    score = analysis.entry("tiny 50% wanda c4").scores["count"]
    assert score.item_error is None
    assert score.low is not None
    assert analysis.entry("tiny dense").scores["count"].low is None
    assert any(note.startswith("count: ") for note in analysis.notes)


def test_every_pair_is_compared_with_dense_baseline_and_first_method(full: Analysis) -> None:
    analysis = full
    pairs = {(c.against, c.a, c.b) for c in analysis.comparisons}
    prefix = "tiny 50%"
    assert ("dense", f"{prefix} magnitude none", "tiny dense") in pairs
    assert ("baseline", f"{prefix} wanda self", f"{prefix} wanda c4") in pairs
    assert ("method", f"{prefix} sparsegpt self", f"{prefix} wanda self") in pairs
    assert not any(a == b for _, a, b in pairs)
    better = next(
        c for c in analysis.comparisons
        if (c.a, c.b, c.column) == (f"{prefix} wanda self", f"{prefix} wanda c4", "quiz")
    )  # fmt: skip
    assert better.delta == pytest.approx(10.0)
    assert better.verdict == "resolved_better"
    assert better.p is not None
    assert better.p_holm is not None
    assert better.p <= better.p_holm <= 1


def test_controls_pass_where_nothing_differs(full: Analysis) -> None:
    analysis = full
    assert [c.passed for c in analysis.controls if c.passed is not None] == [True, True]
    assert analysis.no_ranking == ()
    null = [c for c in analysis.controls if c.passed is None]
    assert null
    assert "above 0 of 2 calibrations" in null[0].words


def test_a_data_free_method_that_varies_forbids_ranking(tmp_path: Path) -> None:
    made, cells = changed(tmp_path, lambda cell: False)
    noisy = next(c for c in cells if c.role == "data-free" and c.draw == 1)
    tasks = result(noisy)
    items = list(tasks["quiz"].metrics["acc"].items or [])
    items[0], items[-1] = 0.0, 1.0
    metric = dataclasses.replace(tasks["quiz"].metrics["acc"], items=items)
    tasks["quiz"] = dataclasses.replace(tasks["quiz"], metrics={"acc": metric})
    Records(tmp_path).write(record_of(noisy, tasks=tasks))
    analysis = analyze(made, cells, Records(tmp_path))
    assert analysis.no_ranking[0].startswith("implementation noise: runs of tiny 50% magnitude")
    assert "items by up to 1" in analysis.no_ranking[0]


def test_a_repeat_that_differs_forbids_ranking(tmp_path: Path) -> None:
    made, cells = changed(tmp_path, lambda cell: False)
    repeat = next(c for c in cells if c.repeat)
    wrong = {**(record_of(repeat).compression or {}), "weights_digest": "another"}
    Records(tmp_path).write(record_of(repeat, compression=wrong))
    analysis = analyze(made, cells, Records(tmp_path))
    assert "weights_digest" in analysis.no_ranking[0]


def test_missing_and_broken_cells_are_told_and_forbid_ranking(tmp_path: Path) -> None:
    made = grid()
    cells = fill(tmp_path, made)
    gone = next(c for c in cells if c.calibration == "self" and c.draw == 2)
    Records(tmp_path).path(gone.key).unlink()
    broken = next(c for c in cells if c.calibration == "self" and c.draw == 1)
    Records(tmp_path).write(record_of(broken, status=FAILED, error="it broke", tasks={}))
    analysis = analyze(made, cells, Records(tmp_path))
    assert analysis.missing == (gone.title,)
    assert analysis.failures == ((broken.title, "it broke"),)
    assert len(analysis.no_ranking) == 2
    row = analysis.entry("tiny 50% wanda self")
    assert (row.draws, row.missing, row.failed) == ((0,), (2,), ("draw 1: it broke",))


@pytest.mark.parametrize("name", ["lm_eval", "tokenizer", "chat_template", "model"])
def test_records_made_under_other_conditions_are_refused(tmp_path: Path, name: str) -> None:
    own = {"lm_eval": "0.4.13", "model": "m", "tokenizer": "t", "chat_template": None}
    made, cells = changed(
        tmp_path, lambda cell: cell.calibration == "self", conditions={**own, name: "other"}
    )
    with pytest.raises(UserError, match=r"other in .*self"):
        analyze(made, cells, Records(tmp_path))


@pytest.mark.parametrize("name", ["version", "n_shot", "hash", "items_digest"])
def test_tasks_that_asked_something_else_are_refused(tmp_path: Path, name: str) -> None:
    made = grid()
    cells = fill(tmp_path, made)
    cell = next(c for c in cells if c.calibration == "self")
    tasks = result(cell)
    tasks["quiz"] = dataclasses.replace(tasks["quiz"], **{name: 7})
    Records(tmp_path).write(record_of(cell, tasks=tasks))
    with pytest.raises(UserError, match="task quiz"):
        analyze(made, cells, Records(tmp_path))


def test_one_draw_that_is_two_sets_is_refused(tmp_path: Path) -> None:
    made = grid()
    cells = fill(tmp_path, made)
    cell = next(c for c in cells if c.method == "sparsegpt" and c.calibration == "c4")
    own = record_of(cell).compression or {}
    Records(tmp_path).write(
        record_of(cell, compression={**own, "calibration": {"calib_id": "x", "tokens": 1}})
    )
    with pytest.raises(UserError, match="tokens of c4, draw 0"):
        analyze(made, cells, Records(tmp_path))


def test_nothing_measured_says_what_to_do(tmp_path: Path) -> None:
    from lm_calib_plugin.leaderboard.cells import cells_of

    made = grid()
    with pytest.raises(UserError, match="lm-calib leaderboard run"):
        analyze(made, cells_of(made), Records(tmp_path))


def test_a_metric_that_a_task_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has acc"):
        said(tmp_path, grid(metrics={"quiz": "acc_norm"}))


def test_variance_is_split_for_each_table(tmp_path: Path) -> None:
    (shares, *_) = said(tmp_path, grid(tasks=["quiz"])).shares
    assert sum(share.value for share in shares.parts.values()) == pytest.approx(1)
    assert set(shares.parts) == {"source", "method", "interaction", "draw"}
    # Ten points between sources and methods each, one between draws.
    assert shares.parts["draw"].value < 0.05


def test_rankings_of_draws_that_agree_are_stable(full: Analysis) -> None:
    ranking = next(r for r in full.rankings if r.column == "quiz" and r.fixed == "wanda")
    assert ranking.entries == ("tiny 50% wanda self", "tiny 50% wanda c4")
    assert ranking.tau == 1
    assert ranking.ranks == ((1.0, 0.0), (0.0, 1.0))


def test_a_heat_map_holds_retention_and_log_ratios_apart(full: Analysis) -> None:
    heats = [h for h in full.heats if h.method == "wanda"]
    assert {h.quantity: h.tasks for h in heats} == {"retention": ("quiz",), "log ratio": ("prose",)}
    assert heats[0].calibrations == ("c4", "self", "null:random")


def test_two_reports_of_equal_records_are_equal(tmp_path: Path, full: Analysis) -> None:
    assert said(tmp_path) == full


def test_gates_judge_compressed_rows_only(full: Analysis) -> None:
    analysis = full
    assert shortfalls(analysis, read_gates(["recovery=0.6"]), GRID["methods"]) == []
    low = shortfalls(analysis, read_gates(["recovery=0.95"]), GRID["methods"])
    assert len(low) == 4
    assert low[0].startswith("tiny 50% wanda c4: recovery 0.6778 is below 0.95")
    assert shortfalls(analysis, {}, []) == []


@pytest.mark.parametrize("text", ["recovry=0.95", "recovery", "recovery=95", "recovery=x"])
def test_gates_are_checked_first(text: str) -> None:
    with pytest.raises(UserError, match="fail-below"):
        read_gates([text])


def test_no_interval_of_a_share_leaves_what_is_possible(tmp_path: Path) -> None:
    made = grid(draws=2)
    cells = fill(tmp_path, made)
    for cell in cells:
        if cell.draw == 1 and cell.role == "compressed":
            tasks = result(cell)
            right = [1.0] * ITEMS
            metric = dataclasses.replace(tasks["quiz"].metrics["acc"], value=1.0, items=right)
            tasks["quiz"] = dataclasses.replace(tasks["quiz"], metrics={"acc": metric})
            Records(tmp_path).write(record_of(cell, tasks=tasks))
    score = analyze(made, cells, Records(tmp_path)).entry("tiny 50% wanda c4").scores["quiz"]
    assert (score.low, score.high) == (0.0, 100.0)


def test_a_repeat_that_failed_is_told(tmp_path: Path) -> None:
    made = grid()
    cells = fill(tmp_path, made)
    repeat = next(c for c in cells if c.repeat)
    Records(tmp_path).write(record_of(repeat, status=FAILED, error="it broke", tasks={}))
    analysis = analyze(made, cells, Records(tmp_path))
    assert analysis.failures == ((repeat.title, "it broke"),)
    assert analysis.missing == ()
    assert any(c.words == "not measured" for c in analysis.controls)


def test_draws_of_one_set_count_once(tmp_path: Path) -> None:
    made = grid()
    cells = fill(tmp_path, made)
    for cell in cells:
        if cell.calibration == "self":
            own = record_of(cell).compression or {}
            data = {"calib_id": "the same", "tokens": 1}
            Records(tmp_path).write(record_of(cell, compression={**own, "calibration": data}))
    analysis = analyze(made, cells, Records(tmp_path))
    row = analysis.entry("tiny 50% wanda self")
    assert (row.draws, row.missing) == ((0,), ())
    assert any("draw 1, 2 does not count" in note for note in analysis.notes)


def test_a_mixture_is_another_set_for_another_method(tmp_path: Path) -> None:
    made = grid(calibrations=["c4", "minimax(c4+self)"])
    cells = fill(tmp_path, made)
    for cell in cells:
        if cell.calibration.startswith("minimax"):
            own = record_of(cell).compression or {}
            data = {"calib_id": f"{cell.method} {cell.draw}", "tokens": 1}
            Records(tmp_path).write(record_of(cell, compression={**own, "calibration": data}))
    assert analyze(made, cells, Records(tmp_path)).no_ranking == ()


def test_a_method_without_data_that_was_asked_for_is_judged(tmp_path: Path) -> None:
    made = grid(methods=["magnitude"])
    analysis = said(tmp_path, made)
    low = shortfalls(analysis, read_gates(["recovery=0.99"]), made.methods)
    assert low == ["tiny 50% magnitude none: recovery 0.5556 is below 0.99"]
    assert shortfalls(analysis, read_gates(["recovery=0.1"]), ["wanda"]) == ["no row to be judged"]


def test_methods_are_compared_with_the_first_that_is_at_a_level(tmp_path: Path) -> None:
    made = grid(
        methods=["wanda", "sparsegpt", "dsnot"],
        levels=["50%", "60%"],
        exclude=[{"method": "wanda", "level": "60%"}],
        tasks=["quiz"],
    )
    pairs = {(c.a, c.b) for c in said(tmp_path, made).comparisons if c.against == "method"}
    assert ("tiny 60% dsnot self", "tiny 60% sparsegpt self") in pairs
    assert ("tiny 60% magnitude none", "tiny 60% sparsegpt c4") in pairs
    assert ("tiny 50% sparsegpt self", "tiny 50% wanda self") in pairs
    assert not any("sparsegpt" in b for a, b in pairs if "50%" in a)


def test_methods_without_data_are_compared_with_each_other(tmp_path: Path) -> None:
    made = grid(
        methods=["rtn", "hqq"],
        levels=["W3"],
        tasks=["quiz"],
        recipe={},
        calibrations=None,
        baseline=None,
    )
    pairs = {(c.a, c.b) for c in said(tmp_path, made).comparisons if c.against == "method"}
    assert pairs == {("tiny W3 hqq none", "tiny W3 rtn none")}
