"""What a comparison of two models on texts is shown as."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm_calib_plugin.accounting import versions
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.comparison.numbers import Array, Interval
from lm_calib_plugin.diagnostics.divergence_figures import distribution, likelihoods
from lm_calib_plugin.diagnostics.document import Document, Figure, Section, Table
from lm_calib_plugin.diagnostics.pair import Pair
from lm_calib_plugin.diagnostics.tally import COLUMNS, Tally, over_documents
from lm_calib_plugin.diagnostics.tokens import TokenDivergence

HARD = 3  # documents that are quoted
EXCERPT = 60
QUOTED = 2000


@dataclass(frozen=True)
class Worst:
    """A position that differs much: ``token`` came, each model had its own ``best`` guess."""

    sequence: int
    position: int
    js: float
    before: str
    token: str
    dense: tuple[str, float]
    compressed: tuple[str, float]


@dataclass(frozen=True)
class Compared:
    """Two models on one text.

    ``rises``: by how much the NLL (nats a token) of each sequence is higher; ``norms`` of the last
    residual stream of the dense model; ``related``: their rank correlation; ``touched``: whether a
    sequence overlaps with the calibration text (None: nothing is known of that).
    """

    text: str
    drawn: CalibrationSet
    parts: Sequence[TokenDivergence]
    tally: Tally
    rises: Sequence[float]
    norms: Sequence[float]
    related: Interval | None
    touched: Sequence[bool] | None
    plain: Sequence[str]
    worst: Sequence[Worst]

    @property
    def hardest(self) -> list[int]:
        """Sequences by falling rise of the NLL."""
        return sorted(range(len(self.rises)), key=lambda i: -self.rises[i])

    def rise(self) -> Interval:
        """Return the rise of the NLL, nats a token, with its interval over sequences."""
        sums = self.tally.sums()
        tokens, dense, compressed = (sums[:, COLUMNS.index("tokens") + i] for i in range(3))
        return over_documents(tokens, [compressed - dense])[0]

    def js_of(self, numbers: Sequence[int]) -> float:
        """Return the mean JS over all tokens of these sequences."""
        return float(np.concatenate([self.parts[i].js.numpy() for i in numbers]).mean())


def document(pair: Pair, texts: Sequence[Compared], facts: Mapping[str, Any]) -> Document:
    """Return the report."""
    calibration = pair.calibration
    data = {
        "pretrained": pair.dense_name,
        "compressed": pair.name,
        "recipe_key": None if pair.report is None else pair.report.key,
        "calibration": None if calibration is None else calibration.summary(),
        "facts": dict(facts),
        "texts": [_data(one) for one in texts],
        "versions": versions(),
    }
    shown = {"model": pair.dense_name, "compared with": pair.name, **facts}
    if pair.report is not None:
        shown["recipe key"] = pair.report.key
    for one in texts:
        shown[f"text {one.text}"] = (
            f"{one.drawn.nsamples} sequences, {one.drawn.tokens} tokens, {one.drawn.calib_id[:12]}"
        )
    sections = [_overview(texts), *(_section(one) for one in texts)]
    title = f"Divergence: {pair.dense_name} and {pair.name}"
    return Document(title, [s for one in texts for s in _findings(one)], shown, sections, data)


def buckets(parts: Sequence[TokenDivergence]) -> list[tuple[int, int, Array, Array]]:
    """Return (first, last, JS, flips) of positions 1, 2-3, 4-7, 8-15...; the first token is 0."""
    found = []
    longest = max((len(part) for part in parts), default=0)
    start = 1
    while start <= longest:
        rows = slice(start - 1, 2 * start - 1)
        js, flips = (
            np.concatenate([getattr(part, name)[rows].numpy() for part in parts])
            for name in ("js", "flipped")
        )
        found.append((start, min(2 * start - 1, longest), js, flips))
        start *= 2
    return found


def half_of(js: Array) -> float:
    """Return the smallest share of the tokens that holds half of all divergence."""
    falling = np.sort(js)[::-1].cumsum()
    return float(np.searchsorted(falling, falling[-1] / 2) + 1) / len(js)


def _findings(one: Compared) -> Iterator[str]:
    row = one.tally.row()
    count = row["positions"]
    js, flips, perplexity = row["js"], row["flip_rate"], row["perplexity"]
    if js["mean"] == 0:
        yield f"{one.text}: both models say the same, bit by bit, at all {count} tokens."
        return
    yield (
        f"{one.text}: JS {js['mean']:.3g} nats a token{_between(js)}, "
        f"{row['js_normalized']['mean']:.1%} of the most there can be; the likeliest next token is "
        f"another one at {flips['mean']:.1%} of {count} tokens; perplexity "
        f"{_number(perplexity['dense'])} -> {_number(perplexity['compressed'])}."
    )
    values = np.concatenate([part.js.numpy() for part in one.parts])
    yield (
        f"{one.text}: half of all divergence stands in {half_of(values):.1%} of the tokens "
        f"(median {js['p50']:.2g}, 99th percentile {js['p99']:.2g} nats)."
    )
    if one.worst:
        worst = one.worst[0]
        yield (
            f"{one.text}: farthest apart in sequence {worst.sequence} at token {worst.position} "
            f"({worst.js:.2g} nats), after {worst.before[-EXCERPT:]!r}: the dense model says "
            f"{worst.dense[0]!r} ({worst.dense[1]:.0%}), the compressed one "
            f"{worst.compressed[0]!r} ({worst.compressed[1]:.0%}); the text says {worst.token!r}."
        )
    short = one.drawn.nsamples - len(one.parts)
    if short:
        yield f"{one.text}: {short} sequences of one token hold nothing to compare."
    hard = one.hardest[0]
    yield (
        f"{one.text}: the hardest is sequence {hard}, {one.plain[hard][:EXCERPT]!r}: its NLL rises "
        f"by {one.rises[hard]:.3g} nats a token, that of all by {one.rise().value:.3g}."
    )
    yield from _norm_finding(one)
    yield from _overlap_finding(one)


def _norm_finding(one: Compared) -> Iterator[str]:
    found = one.related
    if found is None:
        return
    between = f"Spearman {found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
    if not found.excludes_zero:
        yield (
            f"{one.text}: whether the residual norm of the dense model foretells the rise is not "
            f"seen on {len(one.rises)} sequences: {between}."
        )
        return
    which = "small" if found.value < 0 else "large"
    yield (
        f"{one.text}: sequences with a {which} residual norm in the dense model suffer more: "
        f"{between}."
    )


def _overlap_finding(one: Compared) -> Iterator[str]:
    if one.touched is None or not any(one.touched):
        return
    seen = [i for i, hit in enumerate(one.touched) if hit]
    others = [i for i, hit in enumerate(one.touched) if not hit]
    apart = f"JS {one.js_of(seen):.3g} there"
    apart += f", {one.js_of(others):.3g} on the others" if others else ""
    yield (
        f"{one.text}: warning: {len(seen)} of {len(one.touched)} sequences overlap with the "
        f"calibration text ({apart}); calibrate with --fold choose to judge on unseen documents."
    )


def _overview(texts: Sequence[Compared]) -> Section:
    rows = {one.text: one.tally.row() for one in texts}
    apart = Table(
        ["text", "tokens", "JS", "low", "high", "p50", "p95", "p99", "JS/ln2", "KL", "TV", "flips"],
        [
            [text, row["positions"], *(row["js"][k] for k in ("mean", "low", "high")),
             *(row["js"][k] for k in ("p50", "p95", "p99")), row["js_normalized"]["mean"],
             row["kl"]["mean"], row["tv"]["mean"], row["flip_rate"]["mean"]]
            for text, row in rows.items()
        ],
        "Means over tokens. JS (Jensen-Shannon) and KL(dense || compressed) in nats; low and high: "
        "95 % bootstrap over sequences; TV: total variation; flips: share of tokens where the "
        "likeliest next token is another one.",
    )  # fmt: skip
    rises = {one.text: one.rise() for one in texts}
    cost = Table(
        ["text", "NLL dense", "NLL compressed", "rise", "low", "high", "ppl dense", "ppl compr."],
        [
            [text, *row["nll"].values(), rises[text].value,
             *(_known(end) for end in (rises[text].low, rises[text].high)),
             *row["perplexity"].values()]
            for text, row in rows.items()
        ],
        "NLL: nats a token; ppl: its exponential; rise with its 95 % bootstrap over sequences.",
    )  # fmt: skip
    values = {o.text: np.concatenate([p.js.numpy() for p in o.parts]) for o in texts}
    points = {
        o.text: [(float(p.nll_dense.mean()), float(p.nll_compressed.mean())) for p in o.parts]
        for o in texts
    }
    figures = [
        Figure(
            "JS over tokens",
            "Share of tokens (vertical) whose divergence is at least that large (horizontal, "
            "nats, powers of ten). The dashed line is ln 2, the most there can be.",
            " ".join(f"{t}: median {row['js']['p50']:.2g} nats." for t, row in rows.items()),
            lambda colors: distribution(values, colors),
        ),
        Figure(
            "NLL of documents",
            "A point a sequence: nats a token of the dense model (horizontal) and the compressed "
            "one (vertical). On the diagonal nothing has changed.",
            " ".join(f"{t}: rise {rise.value:.2g} nats a token." for t, rise in rises.items()),
            lambda colors: likelihoods(points, colors),
        ),
    ]
    positive = any(bool((v > 0).any()) for v in values.values())
    return Section("By text", (), [apart, cost], figures if positive else figures[1:])


def _section(one: Compared) -> Section:
    sums = one.tally.sums()
    rows: list[list[Any]] = []
    for i in one.hardest:
        means = sums[i, 1:5] / sums[i, 0]
        seen = [] if one.touched is None else [one.touched[i]]
        nll = (sums[i, 6:8] / sums[i, 5]).tolist()
        rows.append(
            [i, len(one.parts[i]), float(means[0]), float(means[3]), *nll, one.rises[i],
             one.norms[i], *seen, one.plain[i][:EXCERPT]]
        )  # fmt: skip
    calibrated = [] if one.touched is None else ["in calibration"]
    documents = Table(
        ["sequence", "tokens", "JS", "flips", "NLL dense", "NLL compressed", "rise",
         "residual norm", *calibrated, "begins"],
        rows,
        "By falling rise of the NLL (nats a token). Residual norm: mean over tokens of the norm of "
        "what the last block of the dense model gives.",
        shown=5,
    )  # fmt: skip
    places = Table(
        ["positions", "tokens", "JS", "flips"],
        [
            [str(a) if a == b else f"{a}-{b}", len(js), float(js.mean()), float(flips.mean())]
            for a, b, js, flips in buckets(one.parts)
        ],
        "By the number of tokens that stand before.",
    )
    worst = Table(
        ["sequence", "token", "JS", "after", "text says", "dense says", "p", "compressed says",
         "p of it"],
        [
            [w.sequence, w.position, w.js, w.before[-EXCERPT:], repr(w.token), repr(w.dense[0]),
             w.dense[1], repr(w.compressed[0]), w.compressed[1]]
            for w in one.worst
        ],
        "Where the two models are farthest apart; p: probability that each gives its own guess.",
        shown=5,
    )  # fmt: skip
    quotes = [
        (f"Sequence {i}: NLL rises by {one.rises[i]:.3g} nats a token", one.plain[i][:QUOTED])
        for i in one.hardest[:HARD]
    ]
    tables = [documents, places, *([worst] if one.worst else [])]
    return Section(f"Text {one.text}", (), tables, quotes=quotes)


def _data(one: Compared) -> dict[str, Any]:
    sums = one.tally.sums()
    return {
        "text": one.text,
        "set": one.drawn.summary(),
        **one.tally.row(),
        "rise": _ends(one.rise()),
        "residual_norm": None if one.related is None else _ends(one.related),
        "sequences": [
            {
                **dict(zip(COLUMNS, sums[i].tolist(), strict=True)),
                "rise": one.rises[i],
                "residual_norm": one.norms[i],
                "in_calibration": None if one.touched is None else one.touched[i],
            }
            for i in range(len(sums))
        ],
        "positions_by_place": [
            {"first": a, "last": b, "tokens": len(js), "js": float(js.mean())}
            for a, b, js, _ in buckets(one.parts)
        ],
        "worst": [vars(w) for w in one.worst],
    }


def _ends(found: Interval) -> dict[str, float | None]:
    return {"value": found.value, "low": _known(found.low), "high": _known(found.high)}


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _between(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f" (95 % {row['low']:.3g} to {row['high']:.3g})"


def _number(value: float | None) -> str:
    return "beyond any number" if value is None else f"{value:.4g}"
