"""The calibration mini-language, its list form, and exact shares."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.expression import (
    SourceTerm,
    expression_text,
    parse_calibration,
    plain_form,
    shares,
)

HALVES = (SourceTerm("c4", weight=0.5), SourceTerm("self", weight=0.5))


@pytest.mark.parametrize(
    "value",
    [
        "c4+self",
        "c4*0.5+self*0.5",
        " c4 * 1 + self * 1 ",
        "c4*1e-3+self*1e-3",
        "c4*.5+self*.5",
        '[{"source": "c4", "weight": 0.5}, {"source": "self", "weight": 0.5}]',
        ' [{"source": "c4"}, {"source": "self"}]',
        '["c4*7", "self*7"]',
        [{"source": "c4", "weight": 2}, {"source": "self", "weight": "2"}],
        ["c4", {"source": "self"}],
        ("c4*2", "self*2"),
    ],
    ids=str,
)
def test_forms_of_one_sum(value: Any) -> None:
    assert parse_calibration(value) == HALVES


@pytest.mark.parametrize(
    ("value", "term"),
    [
        ("self", SourceTerm("self")),
        ("file:my.jsonl", SourceTerm("file", "my.jsonl")),
        ("file: my text.txt ", SourceTerm("file", "my text.txt")),
        ("file:C:/a/b.txt", SourceTerm("file", "C:/a/b.txt")),
        ("hf:org/name:config:train:text", SourceTerm("hf", "org/name:config:train:text")),
        ("task:arc_easy", SourceTerm("task", "arc_easy")),
        (
            "self?temperature=0.8&prefix_tokens=4",
            SourceTerm("self", "", (("temperature", "0.8"), ("prefix_tokens", "4"))),
        ),
        ("self?note=a=b", SourceTerm("self", "", (("note", "a=b"),))),
        ("file:x.txt?column=body*3", SourceTerm("file", "x.txt", (("column", "body"),))),
        ({"source": "self", "temperature": 0.8}, SourceTerm("self", "", (("temperature", "0.8"),))),
        ({"source": "file:a+b*2.txt"}, SourceTerm("file", "a+b*2.txt")),
        ({"source": "file:a*2"}, SourceTerm("file", "a*2")),
        ('{"source": "c4", "weight": 9}', SourceTerm("c4")),
    ],
    ids=str,
)
def test_single_terms(value: Any, term: SourceTerm) -> None:
    assert parse_calibration(value) == (term,)


@pytest.mark.parametrize("value", ["none", "NONE", " none "])
def test_none_is_no_data(value: str) -> None:
    assert parse_calibration(value) == ()
    assert expression_text(()) == "none"
    assert plain_form(()) == "none"


def test_expression_survives_the_argument_parser_of_the_harness() -> None:
    from lm_eval.utils import simple_parse_args_string

    for text in (
        "c4*0.5+self?temperature=0.8&prefix_tokens=4*0.5",
        "file:my.jsonl",
        "hf:a/b:c:d:e",
    ):
        assert simple_parse_args_string(f"method=wanda,calibration={text}")["calibration"] == text


@pytest.mark.parametrize(
    "value",
    [
        "", "+", "c4+", "+c4", "c4++self", "nosuch", "c4*0", "c4*-1", "c4*", "c4*x", "2*c4",
        "none+c4", "self?temperature", "file", "file:", "hf", "task", "c4:en",
        [], {}, [{}], [{"weight": 1}], [{"source": 3}], [["c4"]], 3, None, True, "[", "{}", "[]",
        [{"source": "c4", "weight": 0}], [{"source": "c4", "weight": -1}],
        [{"source": "c4", "weight": float("nan")}], [{"source": "c4", "weight": float("inf")}],
        [{"source": "c4", "weight": None}], [{"source": "c4*0.5"}], "c4*1e999",
    ],
    ids=repr,
)  # fmt: skip
def test_what_cannot_be_read_is_refused(value: Any) -> None:
    with pytest.raises(UserError) as caught:
        parse_calibration(value)
    assert caught.value.argument == "calibration"


_text = st.text("abc/._- +*&=?:#'\"\\{}[],é", min_size=1, max_size=10).map(str.strip).filter(bool)
_argument = _text.map(lambda s: s.replace("?", "")).map(str.strip).filter(bool)
_option = st.tuples(
    st.text("abc_", min_size=1, max_size=6).filter(lambda s: s not in ("source", "weight")), _text
)
_term = st.builds(
    SourceTerm,
    st.just("file"),
    _argument,
    st.lists(_option, max_size=3, unique_by=lambda o: o[0]).map(tuple),
    st.floats(1e-6, 1e6),
)


@given(st.lists(_term, min_size=1, max_size=5))
def test_normal_form_is_read_back_exactly(terms: list[SourceTerm]) -> None:
    entries = [
        {"source": f"file:{t.argument}", "weight": t.weight, **dict(t.options)} for t in terms
    ]
    normal = parse_calibration(entries)
    assert [(t.argument, t.options) for t in normal] == [(t.argument, t.options) for t in terms]
    assert parse_calibration(plain_form(normal)) == normal
    if isinstance(plain_form(normal), list):
        assert parse_calibration(json.dumps(plain_form(normal))) == normal
    assert sum(t.weight for t in normal) == pytest.approx(1)
    for before, after in zip(terms, normal, strict=True):
        total = sum(Fraction(t.weight) for t in terms)
        assert after.weight == pytest.approx(float(Fraction(before.weight) / total))


def test_text_of_a_plain_expression_is_what_one_types() -> None:
    for text in ("self", "c4*0.25+self*0.75", "file:a.txt", "self?temperature=0.8&top_p=0.9"):
        assert expression_text(parse_calibration(text)) == text
    assert plain_form(parse_calibration("self?temperature=0.8")) == "self?temperature=0.8"


# --- shares ------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(0, 5000))
def test_shares_are_exact_and_fair(weights: list[float], total: int) -> None:
    terms = parse_calibration([{"source": "c4", "weight": w} for w in weights])
    counts = shares(terms, total)
    assert sum(counts) == total
    whole = sum(Fraction(w) for w in weights)
    for count, weight in zip(counts, weights, strict=True):
        exact = float(Fraction(weight) / whole * total)
        assert abs(count - exact) < 1 + 1e-6  # never a whole sequence too many or too few
        assert count >= 0


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 40))
def test_shares_that_come_out_even_are_even(weights: list[int], times: int) -> None:
    terms = parse_calibration([{"source": "c4", "weight": w} for w in weights])
    assert shares(terms, sum(weights) * times) == [w * times for w in weights]


@pytest.mark.parametrize(
    ("text", "total", "counts"),
    [
        ("c4*0.5+self*0.5", 8, [4, 4]),
        ("c4*0.5+self*0.5", 7, [4, 3]),  # ties go to the earlier
        ("c4+self+random", 128, [43, 43, 42]),
        ("c4*0.1+self*0.2+random*0.7", 10, [1, 2, 7]),
        ("c4*0.9+self*0.1", 4, [4, 0]),
        ("c4*0.21+self*0.79", 10, [2, 8]),  # the larger remainder wins, not the earlier term
        ("c4*0.26+self*0.37+random*0.37", 10, [2, 4, 4]),
        ("c4*0.29+self*0.71", 100, [29, 71]),
        ("c4", 5, [5]),
        ("c4+self", 0, [0, 0]),
        ("c4+self", 1, [1, 0]),
    ],
)
def test_shares_of_common_mixtures(text: str, total: int, counts: list[int]) -> None:
    assert shares(parse_calibration(text), total) == counts


def test_shares_do_not_depend_on_the_unit_of_the_weights() -> None:
    for scale in (1e-6, 0.3, 7, 1e6):
        weights = [3 * scale, 2 * scale, 2 * scale]
        terms = parse_calibration([{"source": "c4", "weight": w} for w in weights])
        assert shares(terms, 128) == [55, 37, 36]
