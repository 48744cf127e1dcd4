"""The calibration mini-language, its list form, and exact shares."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_calib_plugin import registry
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
        " c4 * 0.5 + self * 0.5 ",
        "c4*5e-1+self*50e-2",
        "c4*0.498+self*0.498",
        "c4*.5+self*.5",
        '[{"source": "c4", "weight": 0.5}, {"source": "self", "weight": 0.5}]',
        ' [{"source": "c4"}, {"source": "self"}]',
        '["c4*0.5", "self*0.5"]',
        [{"source": "c4", "weight": 0.5}, {"source": "self", "weight": "0.5"}],
        ["c4", {"source": "self"}],
        ("c4*.5", {"source": "self", "weight": 0.5}),
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
        ("file:x.txt?column=body*1", SourceTerm("file", "x.txt", (("column", "body"),))),
        ({"source": "self", "temperature": 0.8}, SourceTerm("self", "", (("temperature", "0.8"),))),
        ({"source": "file:a+b*2.txt"}, SourceTerm("file", "a+b*2.txt")),
        ({"source": "file:a*2"}, SourceTerm("file", "a*2")),
        ('{"source": "c4", "weight": 1}', SourceTerm("c4")),
        ("file:my(1).jsonl", SourceTerm("file", "my(1).jsonl")),
        ("file:a(+*?b).txt?column=x", SourceTerm("file", "a(+*?b).txt", (("column", "x"),))),
        ({"source": "file:my(.jsonl"}, SourceTerm("file", "my(.jsonl")),
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


_text = st.text("abc/._- +*&=?:#()'\"\\{}[],é", min_size=1, max_size=10).map(str.strip).filter(bool)
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


def fractions(weights: list[float]) -> list[float]:
    """Scale weights so that they sum to 1."""
    return [weight / sum(weights) for weight in weights]


@given(st.lists(_term, min_size=1, max_size=5))
def test_normal_form_is_read_back_exactly(terms: list[SourceTerm]) -> None:
    weights = fractions([t.weight for t in terms])
    entries = [
        {"source": f"file:{t.argument}", "weight": weight, **dict(t.options)}
        for t, weight in zip(terms, weights, strict=True)
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
    terms = parse_calibration([{"source": "c4", "weight": w} for w in fractions(weights)])
    counts = shares(terms, total)
    assert sum(counts) == total
    whole = sum(Fraction(w) for w in weights)
    for count, weight in zip(counts, weights, strict=True):
        exact = float(Fraction(weight) / whole * total)
        assert abs(count - exact) < 1 + 1e-6  # never a whole sequence too many or too few
        assert count >= 0


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 40))
def test_shares_that_come_out_even_are_even(weights: list[int], times: int) -> None:
    terms = parse_calibration([{"source": "c4", "weight": w} for w in fractions(weights)])
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
        terms = parse_calibration([{"source": "c4", "weight": w} for w in fractions(weights)])
        assert shares(terms, 128) == [55, 37, 36]


# --- weights that are refused ------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("c4*3+self*1", ("weights sum to 4", "type c4*0.75+self*0.25.")),
        ("c4*0.5+self*0.3", ("weights sum to 0.8", "type c4*0.625+self*0.375.")),
        ("c4*2+self*2", ("weights sum to 4", "type c4+self.")),
        ("c4*0.5", ("weights sum to 0.5", "type c4.")),
        ("c4*0.495+self*0.494", ("weights sum to 0.989", "type c4*0.500506+self*0.499494.")),
        ("c4*0.25+self", ("`self` has no weight", "type c4*0.25+self*0.75.")),
        ("c4*2+self", ("`self` has no weight", "type c4+self.")),
        ("c4*-0.5", ("'-0.5'", "positive")),
        ("c4*-0.5+self*1.5", ("'-0.5'", "positive")),
        ("c4*0+self*1", ("'0'", "positive")),
        (
            [{"source": "file:a+b", "weight": 3}, {"source": "c4", "weight": 1}],
            ("sum to 4", 'type [{"source": "file:a+b", "weight": 0.75}'),
        ),
    ],
    ids=str,
)
def test_weights_are_fractions(value: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        parse_calibration(value)
    for word in words:
        assert word in str(caught.value)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_what_is_to_be_typed_instead_is_accepted(weights: list[float]) -> None:
    text = "+".join(f"c4*{weight!r}" for weight in weights)
    if "e" in text:
        return
    try:
        terms = parse_calibration(text)
    except UserError as error:
        terms = parse_calibration(str(error).split("; type ")[1].removesuffix("."))
    for term, weight in zip(terms, weights, strict=True):
        assert term.weight == pytest.approx(weight / sum(weights), abs=0.01)


def test_a_third_written_in_two_digits_is_a_third() -> None:
    terms = parse_calibration("c4*0.33+self*0.33+random*0.33")
    assert [term.weight for term in terms] == [1 / 3] * 3
    assert shares(terms, 9) == [3, 3, 3]


# --- sources within sources --------------------------------------------------------------


@pytest.fixture
def more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register sources and mixtures of every kind of nesting; never imported."""
    table = registry.table

    def entry(kind: registry.Kind, name: str, nested: registry.Nested) -> dict[str, Any]:
        return {name: registry.Entry(kind, name, "no.such:Class", nested=nested)}

    made: dict[str, dict[str, Any]] = {
        "calibration": entry("calibration", "some", "varies") | entry("calibration", "one", "one"),
        "mixture": entry("mixture", "best", "many"),
    }
    rows = {kind: {**table(kind), **made.get(kind, {})} for kind in registry.KINDS}
    monkeypatch.setattr(registry, "table", lambda kind: rows[kind])


C4, SELF = SourceTerm("c4"), SourceTerm("self")


@pytest.mark.parametrize(
    ("value", "term"),
    [
        ("some", SourceTerm("some")),
        ("some:x", SourceTerm("some", "x")),
        ("some:x(c4)", SourceTerm("some", "x", inner=(C4,))),
        (" some : x ( c4 ) ?a=b", SourceTerm("some", "x", (("a", "b"),), inner=(C4,))),
        ("some(c4+self)", SourceTerm("some", inner=HALVES)),
        ("one(one(c4))", SourceTerm("one", inner=(SourceTerm("one", inner=(C4,)),))),
        ("one(file:my(1).txt)", SourceTerm("one", inner=(SourceTerm("file", "my(1).txt"),))),
        ("best(c4*0.5+self*0.5)?b=1", SourceTerm("best", "", (("b", "1"),), inner=HALVES)),
        ({"source": "one", "of": "c4"}, SourceTerm("one", inner=(C4,))),
        ({"source": "some:x?a=b", "of": ["c4", SELF.name]}, SourceTerm(
            "some", "x", (("a", "b"),), inner=HALVES)),
        ({"source": "best", "of": [{"source": "c4"}, {"source": "self"}], "b": 1}, SourceTerm(
            "best", "", (("b", "1"),), inner=HALVES)),
        ('{"source": "best", "of": {"source": "c4"}}', SourceTerm("best", inner=(C4,))),
    ],
    ids=str,
)  # fmt: skip
def test_sources_within_sources(value: Any, term: SourceTerm, more_rows: None) -> None:
    assert parse_calibration(value) == (term,)
    assert parse_calibration(term.text()) == (term,)
    assert parse_calibration(plain_form((term,))) == (term,)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("one", ("`one` needs sources inside parentheses", "one(c4)")),
        ("best", ("`best` needs sources inside parentheses", "best(c4+self)")),
        ("one(c4+self)", ("takes one source, got c4+self", "one(c4)")),
        ("best()", ("nothing stands inside", "null:shuffle(c4)")),
        ("best(none)", ("nothing stands inside",)),
        ("best( )", ("nothing stands inside",)),
        ({"source": "best", "of": []}, ("nothing stands inside",)),
        ("best(c4", ("'best(c4'", "every `(` needs its `)`")),
        ("best(c4))", ("every `(` needs its `)`",)),
        ("file:my(.txt", ("every `(` needs its `)`", '{"source": "file:PATH"}')),
        ({"source": "best(c4"}, ("closing parenthesis",)),
        ("best(c4)x", ("closing parenthesis",)),
        ("best(c4)(c4)", ("closing parenthesis",)),
        ("self(c4)", ("`self` takes no source inside parentheses", "some, one, minimax")),
        ("c4(self)", ("`c4` takes no source inside parentheses",)),
        ({"source": "c4", "of": "self"}, ("`c4` takes no source inside parentheses",)),
        ({"source": "best(c4)", "of": "self"}, ("choose one",)),
        ("nosuch(c4)", ("no source `nosuch`", "mixtures: minimax")),
        ("bst(c4)", ("did you mean `best`?",)),
        ("best(nosuch)", ("no source `nosuch`",)),
        ("best(c4*2+self*2)", ("weights sum to 4", "type c4+self")),
        ("best(c4)+self", ("mixture `best`", "stands alone")),
        ("one(best(c4))", ("mixture `best`", "inside another source")),
        ("best(c4+self)*0.5", ("sum to 0.5", "type best(c4+self).")),
        ("self?of=c4", ("`of`", "list form")),
        ("c4,self", ("joined by +, not by commas",)),
        ("one(" * 10 + "c4" + ")" * 10, ("deep",)),
    ],
    ids=str,
)
def test_nesting_that_cannot_be_read(value: Any, words: tuple[str, ...], more_rows: None) -> None:
    with pytest.raises(UserError) as caught:
        parse_calibration(value)
    for word in words:
        assert word in str(caught.value)


def test_unknown_source_is_told_the_mixtures(more_rows: None) -> None:
    with pytest.raises(UserError, match="mixtures: minimax"):
        registry.find("calibration", "besd", "calibration")


def test_nested_text_survives_the_parsers_of_arguments() -> None:
    from lm_eval._cli.utils import key_val_to_dict
    from lm_eval.utils import simple_parse_args_string

    from lm_calib_plugin.harness.arguments import parse_argument_text

    for text in (
        "null:shuffle(c4*0.5+self?temperature=0.8*0.5)?a=b*0.5+c4*0.5",
        "best(c4+code+self)",
        "file:my(1).jsonl",
    ):
        line = f"method=wanda,calibration={text},sparsity=0.5"
        assert simple_parse_args_string(line)["calibration"] == text
        assert key_val_to_dict(line)["calibration"] == text
        assert parse_argument_text(line)["calibration"] == text


_leaf = st.builds(SourceTerm, st.just("file"), _argument, st.just(()), st.floats(0.1, 1))
_tree = st.recursive(
    _leaf,
    lambda inner: st.builds(
        SourceTerm,
        st.just("some"),
        st.text("xyz", max_size=2),
        st.lists(_option, max_size=2, unique_by=lambda o: o[0]).map(tuple),
        st.floats(0.1, 1),
        st.lists(inner, min_size=1, max_size=3).map(tuple),
    ),
    max_leaves=6,
)


def _mapping(term: SourceTerm, weight: float) -> dict[str, Any]:
    """Say a term in the list form by a way of its own."""
    source = term.name + (f":{term.argument}" if term.argument else "")
    inner = {"of": _mappings(term.inner)} if term.inner else {}
    return {"source": source, "weight": weight, **inner, **dict(term.options)}


def _mappings(terms: Any) -> list[dict[str, Any]]:
    weights = fractions([term.weight for term in terms])
    return [_mapping(term, weight) for term, weight in zip(terms, weights, strict=True)]


@given(st.lists(_tree, min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_tree_is_read_back_exactly(more_rows: None, terms: list[SourceTerm]) -> None:
    normal = parse_calibration(_mappings(terms))
    assert parse_calibration(plain_form(normal)) == normal
    assert parse_calibration(json.dumps(_mappings(terms))) == normal
