"""Order of rows, ranks that may be told, and the sentences that follow from them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from lm_calib_plugin.leaderboard.report import arrange, sentences, wording
from lm_calib_plugin.leaderboard.tables import (
    AVERAGE,
    AVERAGE_PERPLEXITY,
    DENSE,
    PERPLEXITY,
    POINTS,
    Analysis,
    Column,
    Kept,
)
from tests.leaderboard import synthetic

KEPT = Kept("arc_easy", 0.5, 0.6, 0.6, 0.8)


def test_tables_are_one_a_model_and_level_with_dense_first():
    found = arrange.groups(synthetic.analysis())
    places = [(group.model, group.level) for group in found]
    assert places == list(itertools.product(synthetic.MODELS, ("50%", "60%")))
    for group in found:
        assert [row.entry.role == DENSE for row in group.rows].index(True) == 0
        assert {row.entry.level for row in group.rows[1:]} == {group.level}
        worst = [row.entry.kept.worst for row in group.rows[1:]]
        assert worst == sorted(worst, reverse=True)


def test_every_entry_stands_in_a_table():
    analysis = synthetic.analysis()
    seen = {row.entry.id for group in arrange.groups(analysis) for row in group.rows}
    assert seen == {entry.id for entry in analysis.entries}


def by_hand(order, better):
    """Return the ranks each row may take: over all orders that no resolved pair forbids."""
    allowed = [
        line
        for line in itertools.permutations(order)
        if all(line.index(a) < line.index(b) for a, b in better)
    ]
    return {
        name: (
            1 + min(line.index(name) for line in allowed),
            1 + max(line.index(name) for line in allowed),
        )
        for name in order
    }


def four(resolved):
    """Return four rows a > b > c > d without intervals, compared in pairs."""
    rows = [row for row in synthetic.analysis().entries if row.level == "60%"][:4]
    rows = [
        dataclasses.replace(
            row,
            id=name,
            scores={
                AVERAGE: dataclasses.replace(row.scores[AVERAGE], mean=mean, low=None, high=None)
            },
            kept=None,
        )
        for row, name, mean in zip(rows, "abcd", (50.0, 49.0, 48.0, 47.0), strict=True)
    ]
    column = Column(AVERAGE, "mean", POINTS, True, None)
    pairs = [
        dataclasses.replace(
            synthetic.comparison(rows[0], rows[1], "baseline", column),
            a=a,
            b=b,
            delta=1.0,
            verdict="resolved_better" if (a, b) in resolved else "coin_flip",
        )
        for a, b in itertools.combinations("abcd", 2)
    ]
    return Analysis("four", "", (column,), tuple(rows), tuple(pairs))


@pytest.mark.parametrize(
    "resolved",
    [
        set(),
        {("a", "d")},
        {("a", "b"), ("a", "c"), ("a", "d")},
        {("a", "c"), ("a", "d"), ("b", "d")},
        {("a", "d"), ("b", "d"), ("c", "d")},
        set(itertools.combinations("abcd", 2)),
    ],
)
def test_ranks_are_those_of_all_orders_that_resolved_pairs_allow(resolved):
    (group,) = arrange.groups(four(resolved))
    found = {row.entry.id: row.ranks for row in group.rows}
    assert found == by_hand("abcd", resolved)


def test_a_pair_that_was_not_compared_is_told_by_a_third_row():
    whole = four({("a", "b"), ("b", "c")})
    pairs = tuple(p for p in whole.comparisons if (p.a, p.b) != ("a", "c"))
    (group,) = arrange.groups(dataclasses.replace(whole, comparisons=pairs))
    assert {r.entry.id: r.ranks for r in group.rows}["a"] == (1, 2)


def test_what_must_not_be_ranked_keeps_the_order_of_the_grid_and_has_no_ranks():
    whole = synthetic.analysis(no_ranking=("draws differ",), controls=synthetic.NOISE)
    for group in arrange.groups(whole):
        own = [e for e in whole.entries if (e.model, e.level) == (group.model, group.level)]
        assert [row.entry for row in group.rows[1:]] == own
        assert {row.rank for row in group.rows} == {""}
    assert sentences.says(whole) == []
    assert sentences.unranked(whole) == "Implementation noise: not ranked"
    broken = ("1 cell is broken: implementation noise",)
    assert "noise" not in sentences.unranked(synthetic.analysis(no_ranking=broken))


def test_rows_without_scores_stand_last_and_have_no_rank():
    whole = four(set())
    empty = dataclasses.replace(whole.entries[0], scores={}, draws=(), failed=("draw 0: broken",))
    (group,) = arrange.groups(dataclasses.replace(whole, entries=(empty, *whole.entries[1:])))
    assert group.rows[-1].entry.id == "a"
    assert group.rows[-1].rank == ""


def test_verdicts_say_who_cannot_be_told_apart_and_what_is_open():
    texts = [s.text for s in sentences.says(synthetic.analysis())]
    assert any("cannot be told from" in text for text in texts)
    assert any("of the variance of one draw" in text for text in texts)
    whole = four(set(itertools.combinations("abcd", 2)))
    first, *_ = sentences.says(whole)
    assert "resolved against all 3 others in average" in first.text
    open_ = " ".join(s.text for s in sentences.says_not(synthetic.analysis()))
    for words in ("not resolved", "more draws", "1 cell failed and 1 cell did not run", "1.5 %"):
        assert words in open_


@pytest.mark.parametrize(
    ("failures", "missing", "words"),
    [
        ((), ("x", "y"), "2 cells did not run; their rows rest on fewer draws."),
        ((("x", "broken"),), (), "1 cell failed; its row rests on fewer draws."),
    ],
)
def test_only_what_happened_to_cells_is_told(failures, missing, words):
    whole = synthetic.small(failures=failures, missing=missing)
    assert words in [said.text for said in sentences.says_not(whole)]


def opposed():
    """Return three rows whose order by worst task is a, b, c; by average b is better than a."""
    whole = four(set())
    rows = [
        dataclasses.replace(row, kept=dataclasses.replace(KEPT, worst=worst))
        for row, worst in zip(whole.entries[:3], (0.6, 0.5, 0.4), strict=True)
    ]
    pairs = [
        dataclasses.replace(pair, delta=-10.0, verdict="resolved_worse")
        if (pair.a, pair.b) == ("a", "b")
        else pair
        for pair in whole.comparisons
        if "d" not in (pair.a, pair.b)
    ]
    return dataclasses.replace(whole, entries=tuple(rows), comparisons=tuple(pairs))


def test_ranks_follow_the_headline_where_the_worst_task_sorts_otherwise():
    (group,) = arrange.groups(opposed())
    found = {row.entry.id: row.ranks for row in group.rows}
    assert list(found) == ["a", "b", "c"]
    assert found == by_hand("abc", {("b", "a")})


def test_who_is_better_for_sure_is_never_said_to_be_alike():
    whole = opposed()
    first, *_ = sentences.says(whole)
    phrase = {entry.id: wording.phrase(entry) for entry in whole.entries}
    assert f"{phrase['a']} stands first by its worst task" in first.text
    assert f"in average {phrase['b']} is better, resolved" in first.text
    assert "cannot be told" not in first.text


def test_a_contradiction_further_down_is_told():
    whole = opposed()
    swap = {"a": "b", "b": "c", "c": "a"}
    pairs = tuple(
        dataclasses.replace(pair, a=swap[pair.a], b=swap[pair.b]) for pair in whole.comparisons
    )
    first, *_ = sentences.says(dataclasses.replace(whole, comparisons=pairs))
    b, c = (wording.phrase(entry) for entry in whole.entries[1:])
    assert f"{b} stands above {c} by its worst task; in average {c} is better" in first.text


def test_without_retention_rows_stand_by_the_headline_best_first():
    whole = four(set())
    column = Column(AVERAGE_PERPLEXITY, "mean", PERPLEXITY, False, None)
    rows = tuple(
        dataclasses.replace(
            row, kept=kept, scores={column.task: dataclasses.replace(row.scores[AVERAGE], mean=m)}
        )
        for row, m, kept in zip(
            whole.entries,
            (30.0, 10.0, 40.0, 20.0),
            (None, Kept(None, None, None, None, None), None, None),
            strict=True,
        )
    )
    whole = Analysis("perplexities", "", (column,), rows)
    (group,) = arrange.groups(whole)
    assert [row.entry.id for row in group.rows] == ["b", "d", "a", "c"]
    assert "by their means" in wording.legend(whole, column)
