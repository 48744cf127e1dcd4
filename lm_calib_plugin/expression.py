"""The ``calibration=`` mini-language and its one normal form.

``calibration=c4*0.5+self*0.5`` is a sum of sources, each with a weight (a fraction of the
sequences). A source is ``name``, ``name:argument`` and may carry options after ``?`` in the way
of a URL: ``self?temperature=0.8&prefix_tokens=4``. No comma and no brace, so that the expression
survives every ``--model_args`` parser. A list of mappings (YAML, JSON) says the same:
``[{source: c4, weight: 0.5}, {source: "file:a+b.jsonl", weight: 0.5}]``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError, listed, nearest

NO_DATA = "none"
_WEIGHTED = re.compile(r"^(?P<source>.*?)\*\s*(?P<weight>[0-9.]+(?:[eE]-?[0-9]+)?)$")


@dataclass(frozen=True)
class SourceTerm:
    """One term of the sum: source name, its argument, its options, its weight."""

    name: str
    argument: str = ""
    options: tuple[tuple[str, str], ...] = field(default=())
    weight: float = 1.0

    def text(self) -> str:
        """Return the term as it can be typed."""
        options = "&".join(f"{key}={value}" for key, value in self.options)
        return (
            self.name
            + (f":{self.argument}" if self.argument else "")
            + (f"?{options}" if options else "")
        )


def parse_calibration(value: Any) -> tuple[SourceTerm, ...]:
    """Return the normal form of a calibration expression; ``()`` stands for no data at all.

    Parameters
    ----------
    value
        A string of the mini-language, a JSON text of the list form, a mapping, or a sequence of
        strings and mappings with the keys ``source``, ``weight`` and any source option.

    Raises
    ------
    UserError
        When a source is unknown, an option is malformed or a weight is not positive.
    """
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(
                "calibration",
                f"got {value!r}, which is not JSON ({error.msg})",
                'a JSON list looks like [{"source": "c4", "weight": 0.5}]',
            ) from None
    if isinstance(value, str):
        if value.strip().lower() == NO_DATA:
            return ()
        terms = [_term(part) for part in value.split("+")]
    elif isinstance(value, Mapping):
        terms = [_from_mapping(value)]
    elif isinstance(value, Sequence) and value:
        terms = [_term(v) if isinstance(v, str) else _from_mapping(v) for v in value]
    else:
        raise UserError(
            "calibration",
            f"got {value!r}",
            "a source, a sum of sources or a list of them",
            "for instance calibration=self or calibration=file:my.jsonl",
        )
    total = sum(term.weight for term in terms)
    if math.isclose(total, 1, rel_tol=1e-9):
        return tuple(terms)  # as written, so that the normal form of a normal form is itself
    return tuple(replace(term, weight=term.weight / total) for term in terms)


def expression_text(terms: Sequence[SourceTerm]) -> str:
    """Return the canonical text of a parsed expression."""
    if not terms:
        return NO_DATA
    if len(terms) == 1:
        return terms[0].text()
    return "+".join(f"{term.text()}*{term.weight:.6g}" for term in terms)


def plain_form(terms: Sequence[SourceTerm]) -> str | list[dict[str, Any]]:
    """Return a value that :func:`parse_calibration` reads back as exactly these terms.

    One plain source is a text; a sum, and what the mini-language can not spell, is the list form.
    """
    if not terms or (len(terms) == 1 and _spelled(terms[0])):
        return expression_text(terms)
    return [
        {"source": SourceTerm(t.name, t.argument).text(), "weight": t.weight, **dict(t.options)}
        for t in terms
    ]


def _spelled(term: SourceTerm) -> bool:
    parts = [term.argument, *(text for option in term.options for text in option)]
    return not any(set(part) & set("+*?&=") for part in parts)


def shares(terms: Sequence[SourceTerm], total: int) -> list[int]:
    """Split ``total`` sequences by weight, exactly (largest remainder, ties to the earlier)."""
    exact = [term.weight * total for term in terms]
    counts = [math.floor(x + 1e-9) for x in exact]
    order = sorted(range(len(terms)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _term(text: str) -> SourceTerm:
    weighted = _WEIGHTED.match(text.strip())
    if not weighted:
        return _source(text.strip())
    source = _source(weighted["source"].strip())
    return replace(source, weight=_weight(weighted["weight"], text.strip()))


def _source(text: str) -> SourceTerm:
    body, _, query = text.partition("?")
    name, _, argument = body.partition(":")
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
        options.append((key, value))
    return _checked(name.strip(), argument.strip(), tuple(options))


def _from_mapping(value: Any) -> SourceTerm:
    if not isinstance(value, Mapping) or not isinstance(value.get("source"), str):
        raise UserError(
            "calibration",
            f"got {value!r}",
            "each entry of the list form needs a `source`",
            "for instance [{source: c4, weight: 0.5}, {source: self, weight: 0.5}]",
        )
    term = _source(value["source"].strip())
    extra = tuple((k, str(v)) for k, v in value.items() if k not in ("source", "weight"))
    weight = _weight(value.get("weight", 1.0), value)
    return replace(term, options=term.options + extra, weight=weight)


def _weight(value: Any, where: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number <= 0:
        raise UserError(
            "calibration",
            f"weight {value!r} in {where!r}",
            "a weight is a positive share of the sequences",
            "for instance c4*0.5+self*0.5",
        )
    return number


def _checked(name: str, argument: str, options: tuple[tuple[str, str], ...]) -> SourceTerm:
    sources = registry.table("calibration")
    if name in registry.CORPORA:
        if argument:
            raise UserError(
                "calibration",
                f"`{name}` takes no argument, got `{argument}`",
                fix=f"write `{name}`, or hf:{registry.CORPORA[name]} with your own config",
            )
    elif "*" in name:
        raise UserError(
            "calibration",
            f"`{name}` has no weight that can be read",
            "SOURCE*WEIGHT with a positive number, the share of the sequences",
            "for instance c4*0.5+self*0.5",
        )
    elif name not in sources:
        known = [*sources, *registry.CORPORA, NO_DATA]
        raise UserError(
            "calibration",
            f"no source `{name}`" if name else "a source has no name",
            nearest(name, known),
            f"sources: {listed(sources)}; named corpora: {listed(registry.CORPORA)}; {NO_DATA}",
        )
    if name in ("file", "hf", "task") and not argument:
        raise UserError(
            "calibration",
            f"`{name}` needs an argument",
            registry.table("calibration")[name].summary,
        )
    if (name, argument) == ("self", "prefix"):
        argument = ""  # one spelling, so that one recipe has one key
    return SourceTerm(name, argument, options)
