"""The ``calibration=`` mini-language and its one normal form.

``calibration=c4*0.5+self*0.5`` is a sum of sources, each with a weight (a fraction of the
sequences). The grammar, where ``+``, ``*`` and ``?`` count outside parentheses only::

    sum    = term, {"+", term}
    term   = source, ["*", weight]
    source = name, [":", argument], ["(", sum, ")"], ["?", key, "=", value, {"&", key, "=", value}]

Parentheses hold other sources where a source is made of them, ``null:shuffle(c4)``; elsewhere they
are ordinary characters, ``file:my(1).jsonl``. No comma and no brace, so that the expression
survives every ``--model_args`` parser. A list of mappings (YAML, JSON) says the same:
``[{source: c4, weight: 0.5}, {source: "null:shuffle", of: [c4], weight: 0.5}]``.

Either no term has a weight (equal shares) or every term has one and they sum to 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError, listed, nearest

NO_DATA = "none"
SUM_TOLERANCE = 0.01  # c4*0.33+code*0.33+self*0.33 is meant to be equal shares
DEEPEST = 8  # sources within sources
RESERVED = ("source", "weight", "of")  # keys of the list form, so no names of options
_WEIGHTED = re.compile(r"(?P<source>.*)\*\s*(?P<weight>-?[0-9.]+(?:[eE]-?[0-9]+)?)\s*", re.DOTALL)


@dataclass(frozen=True)
class SourceTerm:
    """One term of the sum: source name, its argument, its options, its weight, what it is made of.

    ``inner`` holds the terms between the parentheses, with weights that sum to 1 again.
    """

    name: str
    argument: str = ""
    options: tuple[tuple[str, str], ...] = field(default=())
    weight: float = 1.0
    inner: tuple[SourceTerm, ...] = ()

    def text(self) -> str:
        """Return the term as it can be typed, without its weight."""
        options = "&".join(f"{key}={value}" for key, value in self.options)
        return (
            self.name
            + (f":{self.argument}" if self.argument else "")
            + (f"({expression_text(self.inner)})" if self.inner else "")
            + (f"?{options}" if options else "")
        )


def parse_calibration(value: Any) -> tuple[SourceTerm, ...]:
    """Return the normal form of a calibration expression; ``()`` stands for no data at all.

    Parameters
    ----------
    value
        A string of the mini-language, a JSON text of the list form, a mapping, or a sequence of
        strings and mappings with the keys ``source``, ``of`` (the sources between the
        parentheses), ``weight`` and any source option.

    Raises
    ------
    UserError
        When a source is unknown, an option or a parenthesis is malformed, a weight is not
        positive, the weights do not sum to 1, or a mixture is one term of a sum.
    """
    terms = _parse(value, 0)
    mixtures = registry.table("mixture")
    for term in terms if len(terms) > 1 else ():
        if term.name in mixtures:
            raise UserError(
                "calibration",
                f"the mixture `{term.name}` is one term of a sum",
                "a mixture finds weights of its own and stands alone",
                f"write {term.name}(A+B+C), with every source inside",
            )
    for term in every_term(inner for outer in terms for inner in outer.inner):
        if term.name in mixtures:
            raise UserError(
                "calibration",
                f"the mixture `{term.name}` stands inside another source",
                "only sources can, not mixtures",
                f"write calibration={term.name}(A+B+C)",
            )
    return terms


def expression_text(terms: Sequence[SourceTerm]) -> str:
    """Return the canonical text of a parsed expression; equal shares carry no weights."""
    if not terms:
        return NO_DATA
    if all(term.weight == 1 / len(terms) for term in terms):
        return "+".join(term.text() for term in terms)
    return "+".join(f"{term.text()}*{term.weight:.6g}" for term in terms)


def plain_form(terms: Sequence[SourceTerm]) -> str | list[dict[str, Any]]:
    """Return a value that :func:`parse_calibration` reads back as exactly these terms.

    One source is a text; a sum, and what the mini-language can not spell, is the list form.
    """
    if len(terms) <= 1 and _spelled(terms):
        return expression_text(terms)
    return [
        {"source": SourceTerm(t.name, t.argument).text()}
        | ({"of": _inner_form(t.inner)} if t.inner else {})
        | {"weight": t.weight, **dict(t.options)}
        for t in terms
    ]


def shares(terms: Sequence[SourceTerm], total: int) -> list[int]:
    """Split ``total`` sequences by weight, exactly (largest remainder, ties to the earlier)."""
    exact = [term.weight * total for term in terms]
    counts = [math.floor(x + 1e-9) for x in exact]
    order = sorted(range(len(terms)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def every_term(terms: Iterable[SourceTerm]) -> Iterator[SourceTerm]:
    """Yield the terms, each followed by those inside it."""
    for term in terms:
        yield term
        yield from every_term(term.inner)


def _inner_form(terms: Sequence[SourceTerm]) -> str | list[dict[str, Any]]:
    return expression_text(terms) if _spelled(terms) else plain_form(terms)


def _spelled(terms: Sequence[SourceTerm]) -> bool:
    """Tell whether the text of an expression is read back as exactly these terms."""
    try:
        return _parse(expression_text(terms), 0) == tuple(terms)
    except UserError:
        return False


# --- reading -----------------------------------------------------------------------------


def _parse(value: Any, depth: int) -> tuple[SourceTerm, ...]:
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            why = getattr(error, "msg", "too deep")
            raise UserError(
                "calibration",
                f"got {value!r}, which is not JSON ({why})",
                'a JSON list looks like [{"source": "c4", "weight": 0.5}]',
            ) from None
    if depth > DEEPEST:
        raise UserError(
            "calibration", f"sources within sources, more than {DEEPEST} deep", "fewer parentheses"
        )
    if isinstance(value, str):
        if value.strip().lower() == NO_DATA:
            return ()
        found = [_term(part, depth) for part in _parts(value)]
    elif isinstance(value, Mapping):
        found = [_from_mapping(value, depth)]
    elif isinstance(value, Sequence) and value:
        found = [_term(v, depth) if isinstance(v, str) else _from_mapping(v, depth) for v in value]
    else:
        raise UserError(
            "calibration",
            f"got {value!r}",
            "a source, a sum of sources or a list of them",
            "for instance calibration=self or calibration=file:my.jsonl",
        )
    return _normalized([term for term, _ in found], [weight for _, weight in found])


def _normalized(
    terms: Sequence[SourceTerm], weights: Sequence[float | None]
) -> tuple[SourceTerm, ...]:
    """Return the terms with weights that sum to 1; None stands for a weight that was not given."""
    if all(weight is None for weight in weights):
        return _weighted(terms, [1 / len(terms)] * len(terms))
    given = [weight for weight in weights if weight is not None]
    total = math.fsum(given)
    missing = len(terms) - len(given)
    if missing:
        rest, even = (1 - total) / missing, 1 / len(terms)
        mended = [even if rest <= 0 else rest if w is None else w for w in weights]
        first = terms[list(weights).index(None)].text()
        raise UserError(
            "calibration",
            f"`{first}` has no weight and another source has one",
            "either no source has a weight (equal shares) or every one",
            f"type {_typed(_weighted(terms, mended))}",
        )
    equal = len(set(given)) == 1
    mended = [1 / len(given) if equal else weight / total for weight in given]
    if abs(total - 1) > SUM_TOLERANCE + 1e-9:
        raise UserError(
            "calibration",
            f"weights sum to {total:.6g}",
            "weights are fractions of the sequences and sum to 1",
            f"type {_typed(_weighted(terms, mended))}",
        )
    # Kept as written when they are exact, so that the normal form of a normal form is itself.
    exact = math.isclose(total, 1, rel_tol=1e-9) and not equal
    return _weighted(terms, given if exact else mended)


def _weighted(terms: Sequence[SourceTerm], weights: Sequence[float]) -> tuple[SourceTerm, ...]:
    return tuple(replace(t, weight=w) for t, w in zip(terms, weights, strict=True))


def _typed(terms: Sequence[SourceTerm]) -> str:
    """Return what to type: the text, or the list form where no text says it."""
    text = expression_text(terms)
    try:
        if [t.text() for t in _parse(text, 0)] == [t.text() for t in terms]:
            return text
    except UserError:
        pass
    return json.dumps(plain_form(terms), ensure_ascii=False)


def _depths(text: str) -> list[int] | None:
    """Return how many parentheses are open at each character, None when they do not match."""
    depths, depth = [], 0
    for char in text:
        depth += char == "("
        depths.append(depth)  # both of a pair count as inside
        depth -= char == ")"
        if depth < 0:
            return None
    return None if depth else depths


def _outside(text: str, sign: str) -> list[int]:
    """Return the places of a sign outside parentheses; those that do not match are no signs."""
    depths = _depths(text) or [0] * len(text)
    return [i for i, char in enumerate(text) if char == sign and not depths[i]]


def _parts(text: str) -> list[str]:
    """Split a sum."""
    if _depths(text) is None:
        raise UserError(
            "calibration",
            f"got {text!r}, whose parentheses do not match",
            "every `(` needs its `)`",
            'a path with a single one is typed as [{"source": "file:PATH"}]',
        )
    ends = [*_outside(text, "+"), len(text)]
    starts = [0, *(end + 1 for end in ends)]
    return [text[start:end] for start, end in zip(starts, ends, strict=False)]


def _term(text: str, depth: int) -> tuple[SourceTerm, float | None]:
    # A star inside parentheses is followed by the closing one, so it is never taken for this.
    weighted = _WEIGHTED.fullmatch(text.strip())
    if not weighted:
        return _source(text.strip(), depth), None
    number = _weight(weighted["weight"], text.strip())
    return _source(weighted["source"].strip(), depth), number


def _source(text: str, depth: int) -> SourceTerm:
    """Read a source without its weight."""
    name = _name(text)
    marks = _outside(text, "?")
    body, query = (text[: marks[0]], text[marks[0] + 1 :]) if marks else (text, "")
    opened = body.find("(")
    inner: tuple[SourceTerm, ...] = ()
    if opened >= 0 and _nested(name, written=True) != "no":
        depths = _depths(body) or []
        closed = [i for i, depth in enumerate(depths) if depth == 1 and body[i] == ")"]
        if closed != [len(body.rstrip()) - 1]:
            raise UserError(
                "calibration",
                f"got `{text}`",
                "only ?options and *weight may follow the closing parenthesis",
            )
        inner = _inner(body[opened:].strip()[1:-1], text, depth)
        body = body[:opened]
    elif body[len(name) :].lstrip().startswith("("):
        _nested(name)
        raise _takes_none(name)
    argument = body.partition(":")[2].strip()
    return _checked(SourceTerm(name, argument, _options(query, text), inner=inner))


def _name(text: str) -> str:
    return re.split("[:?(]", text, maxsplit=1)[0].strip()


def _inner(value: Any, where: Any, depth: int) -> tuple[SourceTerm, ...]:
    empty = not value or (isinstance(value, str) and not value.strip())
    terms = () if empty else _parse(value, depth + 1)
    if not terms:
        raise UserError(
            "calibration",
            f"nothing stands inside the parentheses of `{where}`",
            "a source or a sum of sources is needed there",
            "for instance null:shuffle(c4)",
        )
    return terms


def _options(query: str, text: str) -> tuple[tuple[str, str], ...]:
    options = []
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(
                "calibration",
                f"option `{pair}` of `{text}` has no value",
                "options are key=value joined by &",
                "for instance self?temperature=0.8",
            )
        if key in RESERVED:
            raise UserError(
                "calibration",
                f"`{text}`: `{key}` is a key of the list form, no option",
                'for instance [{"source": "null:shuffle", "of": "c4", "weight": 1}]',
            )
        options.append((key, value))
    return tuple(options)


def _from_mapping(value: Any, depth: int) -> tuple[SourceTerm, float | None]:
    if not isinstance(value, Mapping) or not isinstance(value.get("source"), str):
        raise UserError(
            "calibration",
            f"got {value!r}",
            "each entry of the list form needs a `source`",
            "for instance [{source: c4, weight: 0.5}, {source: self, weight: 0.5}]",
        )
    weight = _weight(value["weight"], value) if "weight" in value else None
    name = _name(value["source"])
    if "of" in value:
        if _nested(name, written=True) == "no":
            raise _takes_none(name)
        if "(" in value["source"]:
            raise UserError(
                "calibration", f"got {value!r}", "`of` or parentheses", "choose one of both"
            )
        inner = _inner(value["of"], value["source"] + "()", depth)
        body, _, query = value["source"].strip().partition("?")
        argument = body.partition(":")[2].strip()
        bare = _checked(SourceTerm(name, argument, _options(query, body), inner=inner))
    else:
        bare = _source(value["source"].strip(), depth)
    extra = tuple((str(k), str(v)) for k, v in value.items() if k not in RESERVED)
    return replace(bare, options=bare.options + extra), weight


def _weight(value: Any, where: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number <= 0:
        raise UserError(
            "calibration",
            f"weight {value!r} in {where!r}",
            "a weight is a positive fraction of the sequences",
            "for instance c4*0.5+self*0.5",
        )
    return number


# --- names -------------------------------------------------------------------------------


def _takes_none(name: str) -> UserError:
    takers = [
        row.name
        for kind in ("calibration", "mixture")
        for row in registry.table(kind).values()
        if row.nested != "no"
    ]
    return UserError(
        "calibration",
        f"`{name}` takes no source inside parentheses",
        f"those that do: {listed(takers) or 'none'}",
        f"write {name}",
    )


def _nested(name: str, written: bool = False) -> registry.Nested:
    """Return what a name takes inside parentheses, or say that nobody has this name.

    A third-party source is asked (and imported) only when something is ``written`` there.
    """
    sources, mixtures = registry.table("calibration"), registry.table("mixture")
    if name in registry.CORPORA:
        return "no"
    if name in sources or name in mixtures:
        entry = {**mixtures, **sources}[name]
        return registry.nested_of(entry) if written else entry.nested
    if "*" in name:
        raise UserError(
            "calibration",
            f"`{name}` has no weight that can be read",
            "SOURCE*WEIGHT with a positive number, the fraction of the sequences",
            "for instance c4*0.5+self*0.5",
        )
    if "," in name:
        raise UserError("calibration", f"got `{name}`", "sources are joined by +, not by commas")
    raise UserError(
        "calibration",
        f"no source `{name}`" if name else "a source has no name",
        nearest(name, [*sources, *mixtures, *registry.CORPORA, NO_DATA]),
        f"sources: {listed(sources)}; named corpora: {listed(registry.CORPORA)}; "
        + (f"mixtures: {listed(mixtures)}; " if mixtures else "")
        + NO_DATA,
    )


def _checked(term: SourceTerm) -> SourceTerm:
    """Check name, argument and what stands inside against each other."""
    nested = _nested(term.name, written=bool(term.inner))
    if term.name in registry.CORPORA:
        registry.CORPORA[term.name].checked_argument(term.name, term.argument)
    if term.name in ("file", "hf", "task") and not term.argument:
        raise UserError(
            "calibration",
            f"`{term.name}` needs an argument",
            registry.table("calibration")[term.name].summary,
        )
    if nested in ("one", "many") and not term.inner:
        raise UserError(
            "calibration",
            f"`{term.name}` needs sources inside parentheses",
            fix=f"for instance {term.name}({'c4' if nested == 'one' else 'c4+self'})",
        )
    if nested == "one" and len(term.inner) > 1:
        raise UserError(
            "calibration",
            f"`{term.name}` takes one source, got {expression_text(term.inner)}",
            fix=f"{term.name}({term.inner[0].text()})",
        )
    if (term.name, term.argument) == ("self", "prefix"):
        return replace(term, argument="")  # one spelling, so that one recipe has one key
    return term
