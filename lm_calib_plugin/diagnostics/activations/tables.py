"""The tables of the report: every input, every pair of sets, and what stands out."""

from __future__ import annotations

import math
from typing import Any

from lm_calib_plugin.diagnostics.activations.features import idle_experts
from lm_calib_plugin.diagnostics.activations.findings import (
    TENSOR,
    TOKEN,
    ratio,
    token_text,
    worst,
)
from lm_calib_plugin.diagnostics.activations.result import ALL, REST, OfSet, Result
from lm_calib_plugin.diagnostics.activations.rounding import MEDIAN, PLAIN, ROTATED, SMOOTHED
from lm_calib_plugin.diagnostics.document import Table

_SHOWN = 8


def magnitudes(one: OfSet) -> Table:
    """Return sizes and shapes of the distributions, the input with the largest value first."""
    head = [
        "input", "max", "no first", "p99.9", "p99", "median", "max/median", "kurtosis",
        "of tokens", "of channels", "> 3 sd %", "> 6 sd %", "> 10 sd %", "outliers", "dead",
    ]  # fmt: skip
    rows = []
    for name, parts in one.inputs.items():
        found, rest = parts[ALL], parts[REST]
        if not found["tokens"]:
            rows.append([name, *[None] * (len(head) - 1)])
            continue
        rows.append(
            [
                name,
                found["amax"],
                rest.get("amax"),
                *(found[key] for key in ("p99.9", "p99", "median", "max_over_median", "kurtosis")),
                found["kurtosis_tokens"],
                found["kurtosis_channels"],
                *(100 * found["beyond"][key] for key in ("3", "6", "10")),
                found["outlier_count"],
                len(found["dead_channels"]),
            ]
        )
    rows.sort(key=lambda row: -(row[1] or 0.0))
    caption = (
        "Of |x|: largest value (also without the first token of every sequence), quantiles (within "
        "1.6 %). Kurtosis m4/m2² over all values (3 for normal numbers), and the mean of that of "
        "each token and each channel. Shares of values that far from the mean. Channels above 20 "
        "times the median channel, and channels that were always 0."
    )
    return Table(head, rows, caption, _SHOWN)


def roundings(one: OfSet) -> Table:
    """Return signal-to-noise ratios, the input that rounds worst first."""
    head = [
        "input", "int8/tensor", "no first", "median token", "SmoothQuant", "rotated", "int8/token",
        "fp8/tensor", "int4/token", "no first", "rotated",
    ]  # fmt: skip
    four = "int4 per token"
    rows = [
        [
            name,
            ratio(one, name, TENSOR),
            ratio(one, name, TENSOR, REST),
            ratio(one, name, TENSOR, ALL, PLAIN + MEDIAN),
            ratio(one, name, TENSOR, ALL, SMOOTHED + MEDIAN),
            ratio(one, name, TENSOR, ALL, ROTATED + MEDIAN),
            ratio(one, name, TOKEN),
            ratio(one, name, "fp8 per tensor"),
            ratio(one, name, four),
            ratio(one, name, four, REST),
            ratio(one, name, four, ALL, ROTATED),
        ]
        for name in one.inputs
    ]
    order = {name: place for place, (_, name) in enumerate(worst(one))}
    rows.sort(key=lambda row: order.get(row[0], len(order)))
    caption = (
        "dB, 10 log10(||x||²/||x - Q(x)||²), on sampled rows; one scale a tensor is that of the "
        "largest value of the set. Over all values, where one huge value can be most of the "
        "signal, and that of the median token, also after SmoothQuant (alpha 0.5) and after a "
        "random Hadamard rotation. At last int4, over all values, also rotated."
    )
    return Table(head, rows, caption, _SHOWN)


def pair(result: Result, names: tuple[str, str]) -> Table:
    """Return how alike two sets are at every input, the least alike first."""
    a = names[0]
    head = [
        "input", "overlap", "no first", "halves", "range factor", "halves", "size factor", "halves",
        "rank corr.", "Frobenius", "no first", "angles", "no first", "rank share", "of the other",
    ]  # fmt: skip
    rows = []
    for one in result.inputs:
        found = result.pairs[names].get(one.name, {})
        together, rest = found.get(ALL, {}), found.get(REST, {})
        own = result.sets[a].halves[one.name]
        shares = [result.rank_shares.get(name, {}).get(one.name, {}).get(ALL) for name in names]
        rows.append(
            [
                one.name,
                together.get("jaccard"),
                rest.get("jaccard"),
                own.get("jaccard"),
                _factor(together.get("range_shift")),
                _factor(own.get("range_shift")),
                _factor(together.get("energy_shift")),
                _factor(own.get("energy_shift")),
                together.get("spearman"),
                together.get("frobenius"),
                rest.get("frobenius"),
                together.get("angles"),
                rest.get("angles"),
                *shares,
            ]
        )
    rows.sort(key=lambda row: (row[1] is None, row[1], row[0]))
    ks = sorted({p["k"] for f in result.pairs[names].values() for p in f.values() if "k" in p})
    k = f"{ks[0]:g} to {ks[-1]:g}" if len(ks) > 1 else f"{ks[0]:g}" if ks else "none"
    caption = (
        "Overlap: Jaccard index of the 1 % of channels with the largest |x| (halves: between even "
        f"and odd sequences of {a}). Range factor: exp of the mean |log| of the ratio of the "
        "largest |x| of a channel; size factor: of its root mean square. Rank corr.: "
        "Spearman, of diag(H). Frobenius: ||H_A - H_B||/||H_A||, H the second moments per token. "
        f"Angles: sqrt(1 - ||U_A'U_B||²/k) of the leading k dimensions (k: {k}). Rank share: "
        "tr(H)²/||H||² over the width."
    )
    return Table(head, rows, caption, _SHOWN)


def massive(result: Result, tokenizer: Any) -> Table:
    """Return the massive activations that were kept, the largest first."""
    head = ["set", "level", "channel", "sequence", "position", "token", "value", "times median"]
    rows = [
        [
            name, m.level, m.channel, m.sequence, m.position, token_text(tokenizer, m.token),
            m.value, m.times,
        ]
        for name, one in result.sets.items()
        for m in one.massive
    ]  # fmt: skip
    caption = (
        "Values of the residual stream above 100 and above 1000 times the median |h| of their "
        "token; the 8 largest of every level, of first tokens and of others. Level: the number of "
        "the block that it goes into; the last is what comes out of the last block."
    )
    return Table(head, rows, caption, _SHOWN)


def levels(one: OfSet) -> Table:
    """Return the size of the residual stream by level."""
    stream = one.stream
    assert stream is not None
    rows = [
        [
            level,
            stream.peak(level),
            stream.peak(level, first=False),
            stream.median(level),
            int(stream.counts[0, level].sum()),
            int(stream.counts[1, level].sum()),
        ]
        for level in range(stream.peaks.shape[1])
    ]
    head = ["level", "max", "no first", "median", "massive, first tokens", "massive, others"]
    return Table(head, rows, "Of |h|; the median is that of each token, averaged.", _SHOWN)


def channels(result: Result) -> Table:
    """Return the outlier channels of every input and set, the largest first."""
    rows = [
        [name, layer, entry["channel"], entry["amax"], entry["times"]]
        for name, one in result.sets.items()
        for layer, parts in one.inputs.items()
        for entry in parts[ALL].get("outlier_channels", ())
    ]
    rows.sort(key=lambda row: -float(row[4]))
    head = ["set", "input", "channel", "max", "times median channel"]
    caption = (
        "Channels whose largest |x| is above 20 times that of the median channel; at most 16 an "
        "input."
    )
    return Table(head, rows, caption, _SHOWN)


def features(result: Result) -> Table:
    """Return the outlier features of LLM.int8."""
    rows = [
        [name, e["channel"], 100 * e["blocks"], 100 * e["positions"], e["amax"]]
        for name, one in result.sets.items()
        for e in one.features[ALL]
    ]
    head = ["set", "hidden dimension", "blocks %", "positions %", "max"]
    caption = (
        "Hidden dimensions with |x| of 6 or more in at least 25 % of the blocks and at 6 % or more "
        "of the positions of all of them (arXiv 2208.07339)."
    )
    return Table(head, rows, caption, _SHOWN)


def experts(result: Result) -> Table:
    """Return the experts that few tokens reached."""
    rows = []
    for name, one in result.sets.items():
        tokens = {layer: parts[ALL]["tokens"] for layer, parts in one.inputs.items()}
        found = idle_experts(result.inputs, tokens)
        rows += [[name, entry["expert"], entry["tokens"], entry["even"]] for entry in found]
    caption = "Experts that got less than a tenth of an even share of the tokens of their block."
    return Table(["set", "expert", "tokens", "even share"], rows, caption, _SHOWN)


def _factor(shift: float | None) -> float | None:
    return None if shift is None else math.exp(shift)
