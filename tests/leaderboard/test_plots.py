"""Plots: which there are, and that an SVG is fit for a page."""

from __future__ import annotations

import dataclasses
import re
import struct
from xml.etree import ElementTree

import pytest

from lm_calib_plugin.drawing import svg
from lm_calib_plugin.leaderboard.report import markdown, plots
from lm_calib_plugin.leaderboard.tables import Score
from tests.leaderboard import synthetic

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def drawn():
    return plots.draw(synthetic.small())


def test_every_kind_is_drawn_once_a_place(drawn):
    names = [plot.name for plot in drawn]
    assert len(names) == len(set(names))
    assert {plot.kind for plot in drawn} == set(plots.KINDS)


def test_elements_carry_no_style_no_foreign_color_and_no_address(drawn):
    allowed = {light for light, _ in svg.COLORS.values()}
    for plot in drawn:
        assert not re.search(r"style=|<style|<metadata|<!DOCTYPE|href=\"(?!#)", plot.inline)
        assert "#fe01" not in plot.inline
        if plot.kind in ("tasks", "ranks"):  # cells have the colors of their values
            continue
        colors = re.findall(r"(?:fill|stroke)=\"(#\w+)\"", plot.inline)
        assert set(colors) <= allowed
        assert "pf-ink" in plot.inline


def test_elements_are_said_in_words(drawn):
    space = "{http://www.w3.org/2000/svg}"
    for plot in drawn:
        root = ElementTree.fromstring(plot.inline)
        title, description = root.find(f"{space}title"), root.find(f"{space}desc")
        assert root.get("role") == "img"
        assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        assert title.text == plot.title
        assert len(description.text) > 20


def test_ids_are_told_apart_and_every_reference_leads_somewhere(drawn):
    seen = [re.findall(r' id="([^"]+)"', plot.inline) for plot in drawn]
    everything = [id for ids in seen for id in ids]
    assert len(everything) == len(set(everything))
    for plot, ids in zip(drawn, seen, strict=True):
        found = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', plot.inline)
        assert {a or b for a, b in found} <= set(ids)


def test_files_stand_alone_and_know_the_dark(drawn):
    for plot in drawn:
        assert "prefers-color-scheme:dark" in plot.svg
        ElementTree.fromstring(plot.svg.encode())
        assert plot.png.startswith(b"\x89PNG")
        width, _ = struct.unpack(">II", plot.png[16:24])
        assert width == 900


def test_the_same_bytes_again(drawn):
    again = plots.draw(synthetic.small())
    assert again == drawn


def test_what_must_not_be_ranked_has_no_plot_of_ranks():
    bare = synthetic.small(no_ranking=("noise",), shares=(), heats=())
    bare = dataclasses.replace(bare, entries=bare.entries[:2], comparisons=())
    assert "ranks" not in {plot.kind for plot in plots.draw(bare)}


def rankings(methods, calibrations, columns=("average", "wikitext")):
    """Return a leaderboard of all rankings that such a grid has."""
    whole = synthetic.small(shares=(), heats=(), comparisons=())
    base = whole.entries[1]
    rows = {
        (m, c): dataclasses.replace(base, id=f"{m}/{c}", method=m, calibration=c)
        for m in methods
        for c in calibrations
    }
    first = whole.rankings[0]
    found = []
    for column in columns:
        for place, names in ((0, methods), (1, calibrations)):
            for fixed in names:
                ids = tuple(row.id for key, row in rows.items() if key[place] == fixed)
                if len(ids) > 1:
                    found.append(
                        dataclasses.replace(first, fixed=fixed, column=column, entries=ids)
                    )
    return dataclasses.replace(whole, entries=tuple(rows.values()), rankings=tuple(found))


def test_ranks_are_drawn_for_the_headline_within_methods_and_the_rest_is_named():
    whole = rankings(("a", "b"), ("x", "y", "z"))
    assert [(r.fixed, r.column) for r in plots.ranked(whole)] == [
        ("a", "average"),
        ("b", "average"),
    ]
    assert "2 of 10 rankings" in plots.left_out(whole)
    assert "by average of calibrations within a method" in plots.left_out(whole)
    few = rankings(("a", "b"), ("x",), ("average",))
    assert [r.fixed for r in plots.ranked(few)] == ["x"]
    assert plots.left_out(few) == ""
    text = markdown.markdown(whole, [("a", "plots/a.svg")])
    assert "2 of 10 rankings" in text


def test_perplexities_that_explode_are_drawn_by_their_logarithms():
    whole = synthetic.small(shares=(), heats=(), rankings=(), comparisons=())
    column = next(c for c in whole.columns if c.unit == "perplexity")
    rows = [
        dataclasses.replace(
            entry,
            scores={column.task: Score(draws, sum(draws) / len(draws), 1.0, None, 1.5, 5e12)},
        )
        for entry, draws in zip(whole.entries, ((20.0,), (4e6, 1e8), (30.0, 31.0)), strict=False)
    ]
    found = plots.draw(dataclasses.replace(whole, columns=(column,), entries=tuple(rows)))
    assert {plot.kind for plot in found} == {"quality", "draws"}
    for plot in found:
        assert "logarithms" in plot.reading
        labels = set(re.findall(r">([\d.e]+)<", plot.inline))
        assert {"100", "1e6"} & labels
        assert not any("$" in label for label in labels)


def test_settings_of_matplotlib_are_left_alone(drawn):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.draw(synthetic.small(shares=(), heats=(), rankings=(), entries=()))
    assert dict(matplotlib.rcParams) == before


def test_names_may_be_anything():
    whole = synthetic.small(shares=(), heats=(), rankings=(), comparisons=())
    dense, first, *_ = whole.entries
    odd = [
        dataclasses.replace(first, id=name, calibration=name)
        for name in ("_hidden", "$x^2", "日本語", "a" * 300, "</svg><script>")
    ]
    found = plots.draw(dataclasses.replace(whole, entries=(dense, *odd)))
    for plot in found:
        assert "_hidden" in plot.inline
        assert "<script" not in plot.inline
        ElementTree.fromstring(plot.inline)
