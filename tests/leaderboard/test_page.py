"""The page without a browser: one file, nothing from outside, no name breaks out."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import re

import pytest

from lm_calib_plugin.drawing.markup import Markup, escape, tag
from lm_calib_plugin.leaderboard.report import page
from tests.leaderboard import synthetic


class Reader(html.parser.HTMLParser):
    """Elements with their attributes, and ends that do not fit."""

    VOID = frozenset({"meta", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.wrong = [], [], []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        if not self.open or self.open.pop() != name:
            self.wrong.append(name)


@pytest.fixture(scope="module")
def text():
    return page.render(synthetic.analysis())


@pytest.fixture(scope="module")
def elements(text):
    reader = Reader(text)
    assert (reader.open, reader.wrong) == ([], [])
    return reader.elements


def test_nothing_is_asked_of_a_network(elements):
    for name, attributes in elements:
        assert name not in ("iframe", "img", "object", "embed", "base", "video", "audio")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith(("#", "data:"))
        assert "style" not in attributes
        assert not any(key.startswith("on") for key in attributes)


def test_the_policy_names_exactly_this_style_and_script(text, elements):
    policy = next(a["content"] for n, a in elements if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("style", "script"):
        (content,) = re.findall(rf"<{name}>(.*?)</{name}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_hostile_names_are_text(text):
    assert text.count("<script") == 1
    assert "<img" not in text
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in text


def test_everything_stands_in_the_file_without_a_script(text):
    analysis = synthetic.analysis()
    unescaped = html.unescape(text)
    for entry in analysis.entries:
        for part in (*entry.commands, *entry.keys, *entry.calib_ids, *entry.failed):
            assert part in unescaped
    for part in (*analysis.notes, *analysis.missing, *(w for f in analysis.failures for w in f)):
        assert part in unescaped
    for pair in analysis.comparisons:
        assert pair.words.replace(" %", "\u00a0%") in unescaped


def test_ids_are_unique_and_references_lead_somewhere(elements):
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in elements:
        for name in ("aria-controls", "aria-labelledby"):
            assert set((attributes.get(name) or "").split()) <= set(ids)


def test_no_standard_deviation_without_number_of_draws(text):
    found = re.findall(r"sd [\d.]+([^<]{0,10})", text)
    assert len(found) > 100
    assert all(re.match(r", \d+ draws?", after) for after in found)


def test_an_interval_stands_next_to_every_difference(text):
    rows = re.findall(r'data-c="delta".*?</td>', text)
    assert len(rows) > 100
    assert all(re.search(r"<small>\[.+, .+\]</small>", row) for row in rows[1:])


def test_agreement_of_rankings_is_told(text):
    assert "Do rankings agree?" in text
    assert "wanda, levels with levels</caption>" in text
    assert "−0.33" in text
    assert "Do rankings agree?" not in page.render(synthetic.small(no_ranking=("x",)))


def test_what_must_not_be_ranked_can_not_be_sorted():
    reason = "draws of <i>magnitude</i> differ"
    found = page.render(synthetic.small(no_ranking=(reason,), controls=synthetic.NOISE))
    assert "Implementation noise: not ranked" in found
    assert "draws of &lt;i&gt;magnitude" in found
    (head,) = re.findall(r'id="entries">.*?</thead>', found, re.S)
    assert "<button" not in head


def test_markup_escapes_whatever_is_not_markup():
    assert tag("b", "<&>", title='"x"') == '<b title="&quot;x&quot;">&lt;&amp;&gt;</b>'
    assert tag("b", Markup("<i>"), None, hidden=True, lang=None) == "<b hidden><i></b>"
    assert tag("rect", width=3) == '<rect width="3"/>'
    assert escape("a\u202eb\x00c") == "a b c"
    with pytest.raises(ValueError, match="name of an attribute"):
        tag("b", **{'x"><script': "y"})
