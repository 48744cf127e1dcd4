"""report.md: what stands in it, and that no name breaks out of its place."""

from __future__ import annotations

import re

from lm_calib_plugin.leaderboard.report import markdown, wording
from lm_calib_plugin.leaderboard.tables import Score
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
    reason = "implementation noise: draws of magnitude differ"
    text = markdown.markdown(synthetic.analysis(no_ranking=(reason,)))
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
    assert f"`{wording.INSTALL_PLOTS}`" in markdown.markdown(synthetic.small(), None)


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
