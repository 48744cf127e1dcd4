"""report.md: what stands in it, and that no name breaks out of its place."""

from __future__ import annotations

import dataclasses
import re

from lm_calib_plugin.drawing import words
from lm_calib_plugin.leaderboard.report import markdown, page, wording
from lm_calib_plugin.leaderboard.tables import Control, Score
from tests.leaderboard import synthetic


def sections(text):
    return re.findall(r"^## (.*)$", text, re.M)


def test_verdicts_come_first_and_levels_are_never_pooled():
    found = sections(markdown.markdown(synthetic.analysis()))
    assert found[:2] == ["What this says", "What this does not say"]
    for title in ("SmolLM2-135M · 50%", "SmolLM2-135M · 60%", "Controls", "Conditions", "Failures"):
        assert title in found


def test_tables_have_equal_cells_in_every_line():
    text = markdown.markdown(synthetic.analysis())
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(blocks) > 8
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


def test_names_stay_names():
    text = markdown.markdown(synthetic.analysis())
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.M | re.S)
    for tag in ("<script", "<img", "<b>"):
        assert not re.search(rf"(?<!\\){re.escape(tag)}", outside)


def test_no_standard_deviation_without_number_of_draws():
    text = markdown.markdown(synthetic.analysis())
    found = re.findall(r"sd [\d.]+(.{0,12})", text)
    assert len(found) > 100
    assert all(re.match(r", \d+ draws?\\?\)?", after) for after in found)


def test_what_is_not_ranked_says_so_on_top_with_the_reason():
    reason = "draws of magnitude differ"
    text = markdown.markdown(synthetic.analysis(no_ranking=(reason,), controls=synthetic.NOISE))
    assert text.index("Implementation noise: not ranked") < text.index("## ")
    assert reason in text
    assert "Rankings from one draw" not in text


def test_commands_are_all_there():
    analysis = synthetic.analysis()
    text = markdown.markdown(analysis)
    for entry in analysis.entries:
        for command in entry.commands:
            assert command in text
    assert text.count("<details>") == text.count("</details>") == len(analysis.entries)


def test_plots_are_shown_or_missed():
    text = markdown.markdown(synthetic.small(), [("a [title]", "plots/a.svg")])
    assert "![a \\[title\\]](<plots/a.svg>)" in text
    assert "## Plots" not in markdown.markdown(synthetic.small())
    assert f"`{words.INSTALL_PLOTS}`" in markdown.markdown(synthetic.small(), None)


def test_numbers_are_written_for_people():
    assert wording.number(-0.004) == "0.00"
    assert wording.number(-1.234, signed=True) == "−1.23"
    assert wording.number(0.5, signed=True) == "+0.50"
    assert wording.number(22.7512, "perplexity") == "22.75"
    assert wording.number(1129.4, "perplexity") == "1129"
    assert wording.number(0.01234, "bits") == "0.0123"
    assert wording.number(None) == wording.number(float("nan")) == "–"
    assert wording.number(float("inf"), "perplexity") == "∞"
    assert wording.percent(0.9344) == "93.4 %"
    assert wording.probability(0.0001) == "< 0.001"
    assert wording.spread(Score((1.0, 3.0), 2.0, 1.41421), "points") == "sd 1.41, 2 draws"
    assert wording.spread(Score((1.0,), 1.0), "points") == "1 draw"
    assert wording.interval(-1, 2, signed=True) == "[−1.00, +2.00]"


def test_huge_and_empty_numbers_are_not_spread_out():
    unit = "perplexity"
    broken = Score((4e6, 1.294e8), 6.67e7, 8.87e7, None, 3943.0, 5.02e12)
    assert wording.short(broken.mean, unit) == "> 1e6"
    assert wording.spread(broken, unit) == "sd > 1e6, 2 draws"
    assert wording.bounds(broken, unit) == "[3943, > 1e6]"
    assert wording.spread(broken, unit, full=True) == "sd 8.87e+07, 2 draws"
    assert wording.extremes(broken) == (4e6, 1.294e8)
    same = Score((54.5, 54.5), 54.5, 0.0, None, 54.5, 54.5)
    assert wording.spread(same, "points") == "2 draws, all the same"
    assert wording.bounds(same, "points") == wording.bounds(Score((1.0,), 1.0), "points") == ""
    whole = synthetic.small()
    entry = dataclasses.replace(whole.entries[1], scores={"wikitext": broken})
    whole = dataclasses.replace(whole, entries=(entry,), comparisons=(), rankings=())
    text = markdown.markdown(whole)
    assert "| > 1e6 (sd > 1e6, 2 draws) \\[3943, \\> 1e6\\] |" in text
    assert "e+" not in text


def test_agreement_of_rankings_is_a_square_table():
    text = markdown.markdown(synthetic.analysis())
    assert "**org/Tiny-Llama · 60% · wanda, tasks with tasks**" in text
    assert "| hellaswag | +0.33 | +1.00 | – |" in text
    assert "**org/Tiny-Llama · wanda, levels with levels**" in text
    assert "| 60% | −0.33 | +1.00 |" in text
    assert "Do rankings agree" not in markdown.markdown(synthetic.analysis(no_ranking=("x",)))


def test_draws_that_disagree_on_the_winner_are_marked():
    whole = synthetic.small()
    turning = sum(pair.flips for pair in whole.comparisons)
    assert 0 < turning < len(whole.comparisons)
    for text in (markdown.markdown(whole), page.render(whole)):
        assert text.count("the winner changes with the draw") == turning


def test_rows_are_named_by_what_they_take():
    by_role = {entry.role: entry for entry in synthetic.analysis().entries}
    assert wording.name(by_role["data-free"]) == "magnitude, without data"
    assert wording.phrase(by_role["data-free"]) == "magnitude, without data"
    assert wording.name(by_role["dense"]) == "dense"
    assert wording.name(by_role["null"]).endswith(" · null:shuffle")


def test_the_legend_explains_what_stands_behind_a_mean():
    for text in (markdown.markdown(synthetic.analysis()), page.render(synthetic.analysis())):
        text = text.replace("\u00a0", " ")
        assert text.count("sd, the standard deviation over draws, and the number of draws") == 1
        assert "in brackets the 95 % interval over draws and items" in text


def test_versions_that_differ_say_so():
    found = dict(wording.conditions(synthetic.analysis(conditions={"torch": "2.12, 2.13", "x": 1})))
    assert found == {"torch": "2.12, 2.13 (not the same for all records)", "x": "1"}
    assert "shared by all" not in page.render(synthetic.analysis())


def test_null_calibrations_are_one_line_a_method_and_level():
    said = "without meaning, it scores above {} of 3 calibrations in {}"
    null = [
        Control(f"m, wanda {level}, null:{name}", None, said.format(beaten, task))
        for level in ("50%", "60%")
        for name, beaten in (("ascii", 0), ("random", 1))
        for task in ("average", "perplexity")
    ]
    others = [Control("m, wanda 50%, c4, run twice", None, "not measured"), *synthetic.NOISE]
    found = wording.controls([others[0], *null, others[1]])
    assert [control.name for control in found] == [
        others[0].name, "m, wanda 50%, null", "m, wanda 60%, null", others[1].name
    ]  # fmt: skip
    assert found[1].words == (
        "calibrations without meaning score above: null:ascii 0 of 3 calibrations in average,"
        " 0 of 3 calibrations in perplexity; null:random 1 of 3 calibrations in average,"
        " 1 of 3 calibrations in perplexity"
    )
