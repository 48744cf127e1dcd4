"""Order of rows, ranks that may be told, and the sentences that follow from them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from lm_calib_plugin.leaderboard.report import arrange, sentences
from lm_calib_plugin.leaderboard.tables import AVERAGE, DENSE, POINTS, Analysis, Column
from tests.leaderboard import synthetic


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
    whole = synthetic.analysis(no_ranking=("implementation noise: draws differ",))
    for group in arrange.groups(whole):
        own = [e for e in whole.entries if (e.model, e.level) == (group.model, group.level)]
        assert [row.entry for row in group.rows[1:]] == own
        assert {row.rank for row in group.rows} == {""}
    assert sentences.says(whole) == []
    assert sentences.unranked(whole) == "Implementation noise: not ranked"
    assert "noise" not in sentences.unranked(synthetic.analysis(no_ranking=("2 cells broken",)))


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
