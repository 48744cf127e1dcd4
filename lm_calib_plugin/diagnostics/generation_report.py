"""What a comparison of written texts is shown as."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_calib_plugin.accounting import versions
from lm_calib_plugin.diagnostics.document import Document, Figure, Section, Table
from lm_calib_plugin.diagnostics.generation import SHORT, Generated, Side, Written
from lm_calib_plugin.diagnostics.health import (
    LOOP_DEFINITION,
    REFUSALS,
    distinct_share,
    refuses,
    repeated_share,
)
from lm_calib_plugin.diagnostics.pair import Pair
from lm_calib_plugin.drawing import canvas
from lm_calib_plugin.drawing.svg import Palette

EXCERPT = 60


def document(pair: Pair, found: Generated, facts: Mapping[str, Any]) -> Document:
    """Return the report; ``facts`` is what was looked at."""
    report = pair.report
    keys = {} if report is None else {"recipe key": report.key}
    calibration = pair.calibration
    if calibration is not None:
        keys["calibration"] = calibration.calib_id[:12]
    return Document(
        f"Generation: {pair.dense_name} and {pair.name}",
        list(_findings(found, pair.tokenizer)),
        {**facts, **keys},
        [_measures(found), _differences(found), _texts(found)],
        {
            **{name.replace(" ", "_"): value for name, value in facts.items()},
            "recipe": None if report is None else report.recipe,
            "recipe_key": None if report is None else report.key,
            "calibration": None if calibration is None else calibration.summary(),
            **_data(found),
            "versions": versions(),
        },
    )


def _findings(found: Generated, tokenizer: Any) -> Iterator[str]:
    count = len(found.prompts)
    places = found.differences
    equal = sum(place is None for place in places)
    if equal == count:
        yield f"Both models write the same for all {count} prompts, token by token."
    else:
        apart = sorted(p for p in places if p is not None)
        yield (
            f"{equal} of {count} texts are the same; the others first differ at token "
            f"{apart[len(apart) // 2] + 1} in the median ({apart[0] + 1} to {apart[-1] + 1} of "
            f"{found.limit})."
        )
    yield from _loop_findings(found, tokenizer)
    yield from _length_findings(found)
    yield from _refusal_findings(found)


def _loop_findings(found: Generated, tokenizer: Any) -> Iterator[str]:
    before, after, gap = found.compared()["loops"]
    count = len(found.prompts)
    if not before and not after:
        yield f"No text ends in a loop, of either model ({count} prompts)."
        return
    yield (
        f"{after * count:.0f} of {count} texts of the compressed model end in a loop, "
        f"{before * count:.0f} of the dense one: {gap.value:+.0%} "
        f"(95 % {gap.low:+.0%} to {gap.high:+.0%})."
    )
    loops = [(one.loop, i) for i, one in enumerate(found.compressed.texts) if one.loop]
    if loops:
        worst, number = max(loops, key=lambda pair: pair[0].tokens)
        piece = str(tokenizer.decode(list(worst.piece)))
        yield (
            f"Longest loop: {piece[:EXCERPT]!r}, {worst.times:.3g} times, after prompt {number}, "
            f"{_end(found.prompts[number])!r}."
        )


def _length_findings(found: Generated) -> Iterator[str]:
    odd = found.lengths()
    words = {
        "ended early": f"end at less than {SHORT:.0%} of the tokens of the dense text",
        "never ended": "go on to the limit where the dense text ends",
        "empty": "are empty where the dense text is not",
    }
    for name, numbers in odd.items():
        if numbers:
            first = numbers[0]
            yield (
                f"{len(numbers)} of {len(found.prompts)} texts {words[name]}, such as that of "
                f"prompt {first}, {_end(found.prompts[first])!r}."
            )


def _refusal_findings(found: Generated) -> Iterator[str]:
    before, after, gap = found.compared()["refusals"]
    count = len(found.prompts)
    if before or after:
        yield (
            f"{after * count:.0f} of {count} answers of the compressed model refuse, "
            f"{before * count:.0f} of the dense one: {gap.value:+.0%} "
            f"(95 % {gap.low:+.0%} to {gap.high:+.0%})."
        )


def _measures(found: Generated) -> Section:
    rows: list[list[Any]] = [
        [name, before, after, gap.value, gap.low, gap.high]
        for name, (before, after, gap) in found.compared().items()
    ]
    for n in (1, 2):
        own = [distinct_share([t.ids for t in side.texts], n) for side in _sides(found)]
        gap = None if None in own else own[1] - own[0]  # type: ignore[operator]
        rows.append([f"distinct-{n}", *own, gap, None, None])
    rows += [
        [name, None, len(numbers) / len(found.prompts), None, None, None]
        for name, numbers in found.lengths().items()
        if name != "empty"
    ]
    table = Table(
        ["measure", "dense", "compressed", "difference", "low", "high"],
        rows,
        "Shares of texts, but for: tokens (mean), repeated 4-grams (mean share of those that stood "
        "in the text before), distinct-n (n-grams that differ over all n-grams, of all texts); "
        "low, high: 95 % bootstrap over prompts.",
    )
    sentences = (
        LOOP_DEFINITION[0].upper() + LOOP_DEFINITION[1:] + ".",
        "Refusals are texts that begin with one of: " + "; ".join(REFUSALS) + ".",
    )
    return Section("Measures", sentences, [table])


def _differences(found: Generated) -> Section:
    survival = found.survival()
    picked = sorted({1, 2, 4, 8, 16, 32, 64, 128, 256, 512, found.limit})
    rows = [[t, survival[t - 1]] for t in picked if t <= found.limit]
    table = Table(["tokens", "still the same"], rows, "Share of texts equal up to that token.")
    figure = Figure(
        "Texts still the same",
        "Share of texts (vertical) that both models wrote alike up to a token (horizontal).",
        f"{survival[0]:.0%} after the first token, {survival[-1]:.0%} at token {found.limit}.",
        lambda colors: _survival(survival, colors),
    )
    return Section("First difference", (), [table], [figure])


def _survival(survival: Sequence[float], colors: Palette) -> Any:
    title, subtitle = "Texts still the same", "share of texts, by tokens written"
    figure, axis = canvas.new_figure(2.5, title, subtitle, colors)
    axis.step(range(len(survival) + 1), [1.0, *survival], where="post", color=colors.series(0))
    axis.set_ylim(0, 1.02)
    axis.set_xlim(0, len(survival))
    axis.set_xlabel("tokens written")
    axis.set_ylabel("share of texts")
    axis.grid(color=colors["grid"], linewidth=0.7)
    axis.set_axisbelow(True)
    return figure


def _texts(found: Generated) -> Section:
    places = found.differences
    rows = []
    quotes = []
    order = sorted(range(len(places)), key=lambda i: (not _odd(found, i), i))
    for i in order:
        one, other = found.dense.texts[i], found.compressed.texts[i]
        what = _odd(found, i)
        place = places[i]
        rows.append([i, _end(found.prompts[i]), None if place is None else place + 1, what])
        told = f" ({what})" if what else ""
        quotes.append(
            (
                f"Prompt {i}{told}: {_end(found.prompts[i])}",
                f"PROMPT\n{found.prompts[i]}\n\nDENSE{_note(one)}\n{one.text}\n\n"
                f"COMPRESSED{_note(other)}\n{other.text}",
            )
        )
    table = Table(
        ["prompt", "ends with", "first difference", "compressed text"],
        rows,
        "First difference: the token, from 1; empty for equal texts. Odd texts come first.",
        shown=8,
    )
    return Section("Texts", (), [table], quotes=quotes)


def _odd(found: Generated, number: int) -> str:
    """Return what is odd about a text of the compressed model, in words."""
    one, other = found.dense.texts[number], found.compressed.texts[number]
    said = ["loops"] if other.loop else []
    said += [name for name, numbers in found.lengths().items() if number in numbers]
    if refuses(other.text):
        said.append("refuses")
    if said and bool(one.loop) and said == ["loops"]:
        said = ["loops, as the dense text"]
    return ", ".join(said)


def _data(found: Generated) -> dict[str, Any]:
    return {
        "definitions": {"loop": LOOP_DEFINITION, "refusals": list(REFUSALS)},
        "limit": found.limit,
        "measures": {
            name: {
                "dense": before,
                "compressed": after,
                "difference": {"value": gap.value, "low": gap.low, "high": gap.high},
            }
            for name, (before, after, gap) in found.compared().items()
        },
        "distinct": {
            str(n): [distinct_share([t.ids for t in side.texts], n) for side in _sides(found)]
            for n in (1, 2, 3, 4)
        },
        "odd_lengths": found.lengths(),
        "identical": sum(p is None for p in found.differences) / len(found.prompts),
        "survival": found.survival(),
        "texts": [
            {
                "prompt": found.prompts[i],
                "prompt_ids": list(found.prompt_ids[i]),
                "first_difference": place,
                "dense": _plain(found.dense.texts[i]),
                "compressed": _plain(found.compressed.texts[i]),
            }
            for i, place in enumerate(found.differences)
        ],
    }


def _plain(one: Written) -> dict[str, Any]:
    loop = one.loop
    return {
        "text": one.text,
        "ids": list(one.ids),
        "end": one.end,
        "loop": None if loop is None else {"piece": list(loop.piece), "tokens": loop.tokens},
        "repeated": repeated_share(one.ids),
        "refuses": refuses(one.text),
    }


def _sides(found: Generated) -> tuple[Side, Side]:
    return found.dense, found.compressed


def _note(one: Written) -> str:
    return f" ({len(one.ids)} tokens, {'cut' if one.end is None else 'ended'})"


def _end(text: str) -> str:
    plain = " ".join(text.split())
    return plain[-EXCERPT:]
