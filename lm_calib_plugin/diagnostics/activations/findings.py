"""The answer in sentences that name layers, channels, tokens and experts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from lm_calib_plugin.diagnostics.activations.features import idle_experts
from lm_calib_plugin.diagnostics.activations.result import ALL, REST, OfSet, Result
from lm_calib_plugin.diagnostics.activations.rounding import MEDIAN, PLAIN, ROTATED, SMOOTHED
from lm_calib_plugin.diagnostics.activations.stream import SIZE, TIMES, Massive

# Below this ratio in dB rounding takes more than a hundredth of the energy: our own threshold.
BAD = 20.0
# Sets differ when their channels are so many times as far apart as those of halves of one set, and
# by more than a tenth.
_FAR, _TENTH = 2.0, math.log(1.1)
_NAMED = 3
# First tokens make a range that is so many times that of all others.
_FIRST = 5.0
# Values of the residual stream that are so much of the way to massive are called nearly so.
_NEARLY = 0.1
TENSOR, TOKEN = "int8 per tensor", "int8 per token"


def findings(result: Result, tokenizer: Any = None) -> list[str]:
    """Return everything worth saying, the most important first."""
    found = [sentence for one in result.sets.values() for sentence in _of_set(one, tokenizer)]
    return [*_verdict(result), *found, *_dead(result), *_experts(result), *_pairs(result)]


def ratio(
    one: OfSet, name: str, kind: str, part: str = ALL, transform: str = PLAIN
) -> float | None:
    """Return a ratio in dB, None where nothing was measured."""
    found: dict[str, dict[str, float | None]] = one.inputs[name][part].get("snr", {})
    return found.get(transform, {}).get(kind)


def worst(one: OfSet, kind: str = TENSOR, part: str = ALL) -> list[tuple[float, str]]:
    """Return ratios in dB and names of inputs, the lowest first.

    Of each the lower one of that over all values and that of the median token.
    """
    found = []
    for name in one.inputs:
        both = [ratio(one, name, kind, part, how) for how in (PLAIN, PLAIN + MEDIAN)]
        known = [value for value in both if value is not None]
        found += [(min(known), name)] if known else []
    return sorted(found)


def token_text(tokenizer: Any, token: int) -> str:
    """Return a token as people read it."""
    if tokenizer is None:
        return f"id {token}"
    return repr(str(tokenizer.decode([token])) or str(tokenizer.convert_ids_to_tokens(token)))


def _of_set(one: OfSet, tokenizer: Any) -> list[str]:
    return [*_rounding(one), *_outliers(one), *_massive(one, tokenizer), *_features(one)]


def _rounding(one: OfSet) -> list[str]:
    order = worst(one)
    if not order:
        return []
    low = [name for value, name in order if value < BAD]
    name = order[0][1]
    beside = [
        f"{what} {_db(found)}"
        for what, found in (
            ("without first tokens", ratio(one, name, TENSOR, REST, PLAIN + MEDIAN)),
            ("with one scale a token", ratio(one, name, TOKEN, ALL, PLAIN + MEDIAN)),
            ("after SmoothQuant", ratio(one, name, TENSOR, ALL, SMOOTHED + MEDIAN)),
            ("after a rotation", ratio(one, name, TENSOR, ALL, ROTATED + MEDIAN)),
        )
        if found is not None
    ]
    told = (
        f"the worst is {name} with {_db(ratio(one, name, TENSOR))} over all values and "
        f"{_db(ratio(one, name, TENSOR, ALL, PLAIN + MEDIAN))} for the median token"
    )
    told += f" ({', '.join(beside)})" if beside else ""
    if low:
        what = f"will hurt: the signal is less than {BAD:g} dB above the rounding noise at "
        what += f"{len(low)} of {len(order)} inputs"
    else:
        what = f"will not hurt: {BAD:g} dB or more at all {len(order)} inputs"
    return [f"int8 with one scale a tensor {what} (set {one.name}); {told}."]


def _outliers(one: OfSet) -> list[str]:
    def with_any(part: str) -> list[tuple[float, str, dict[str, Any]]]:
        found = [
            (channels[0]["times"], name, channels[0])
            for name, parts in one.inputs.items()
            if (channels := parts[part].get("outlier_channels"))
        ]
        return sorted(found, key=lambda entry: -entry[0])

    largest = max(
        ((parts[ALL]["amax"], name) for name, parts in one.inputs.items() if parts[ALL]["tokens"]),
        default=None,
    )
    if largest is None:
        return []
    amax, name = largest
    channel = one.inputs[name][ALL]["top_channel"]
    rest = one.inputs[name][REST].get("amax")
    without = "" if rest is None else f", {rest:.4g} without first tokens"
    sentences = [
        f"The largest input of set {one.name} is {amax:.4g}{without}: {name}, channel {channel}."
    ]
    sentences += _first_tokens(one)
    found = with_any(ALL)
    for times, name, entry in found[:_NAMED]:
        sentences.append(
            f"{name}: channel {entry['channel']} is {times:.0f} times the median channel "
            f"(set {one.name})."
        )
    if found:
        strict = sum(1 for _, name, _ in found if one.inputs[name][ALL]["strict_outliers"])
        sentences.append(
            f"{len(found)} of {len(one.inputs)} inputs have channels more than 20 times the median "
            f"channel (set {one.name}), {strict} of them with values above 6; without first "
            f"tokens {len(with_any(REST))} do."
        )
    else:
        sentences.append(
            f"No channel is 20 times the median channel of its input (set {one.name})."
        )
    return sentences


def _first_tokens(one: OfSet) -> list[str]:
    """Name the inputs whose largest value is that of first tokens by far."""
    found = [
        (parts[ALL]["amax"] / parts[REST]["amax"], name)
        for name, parts in one.inputs.items()
        if parts[REST].get("amax") and parts[ALL]["amax"] > _FIRST * parts[REST]["amax"]
    ]
    if not found:
        return []
    times, name = max(found)
    return [
        f"First tokens make the range of {len(found)} of {len(one.inputs)} inputs (set "
        f"{one.name}): without them the largest value is less than a fifth; at {name} "
        f"{times:.0f} times smaller."
    ]


def _massive(one: OfSet, tokenizer: Any) -> list[str]:
    stream = one.stream
    assert stream is not None
    if not stream.count():
        top = max(stream.top.values())
        nearly = top.size > SIZE and top.times > _NEARLY * TIMES
        return [
            f"{'Nearly a' if nearly else 'No'} massive activation (above {SIZE:g} and {TIMES:g} "
            f"times the median of its token) in the residual stream (set {one.name}): the largest "
            f"value is {top.value:.4g}, {top.times:,.0f} times the median of its token, at "
            f"{_place(top, tokenizer)}."
        ]
    sentences = []
    for part, where in ((0, "at first tokens"), (1, "at other tokens")):
        count = int(stream.counts[part].sum())
        if not count:
            continue
        top = next(m for m in stream.largest() if (m.position == 0) == (part == 0))
        channels = stream.counts[part].sum(0).nonzero()[:, 0].tolist()
        sentences.append(
            f"{count} massive activations {where} (set {one.name}), in channel"
            f"{'s' * (len(channels) != 1)} {_some(channels)} of the residual stream; the largest "
            f"is {top.value:.4g}, {top.times:,.0f} times the median of its token, at "
            f"{_place(top, tokenizer)}."
        )
    return sentences


def _place(one: Massive, tokenizer: Any) -> str:
    token = token_text(tokenizer, one.token)
    return f"position {one.position} ({token}), channel {one.channel}, level {one.level}"


def _features(one: OfSet) -> list[str]:
    found, rest = one.features[ALL], one.features[REST]
    if not found:
        return []
    channels = _some([entry["channel"] for entry in found])
    top = found[0]
    return [
        f"{len(found)} outlier feature{'s' * (len(found) != 1)} in the sense of LLM.int8 (set "
        f"{one.name}): hidden dimension{'s' * (len(found) != 1)} {channels}; {top['channel']} is 6 "
        f"or more at {top['positions']:.0%} of the positions. Without first tokens: {len(rest)}."
    ]


def dead_channels(result: Result) -> dict[str, list[int]]:
    """Return, by input, the channels that were 0 at every token of every set."""
    found = {}
    for one in result.inputs:
        seen = [s.inputs[one.name][ALL] for s in result.sets.values()]
        lists = [set(part["dead_channels"]) for part in seen if part["tokens"]]
        both = set.intersection(*lists) if lists else set()
        if both:
            found[one.name] = sorted(both)
    return found


def _dead(result: Result) -> list[str]:
    found = sorted(dead_channels(result).items(), key=lambda entry: -len(entry[1]))
    widths = {one.name: one.width for one in result.inputs}
    sentences = [
        f"{name}: {len(channels)} of {widths[name]} channels were 0 at every token of every set "
        f"({_some(channels)})."
        for name, channels in found[:_NAMED]
    ]
    if len(found) > _NAMED:
        sentences.append(f"{len(found)} inputs in all have such dead channels.")
    return sentences


def _experts(result: Result) -> list[str]:
    sentences = []
    for one in result.sets.values():
        tokens = {name: parts[ALL]["tokens"] for name, parts in one.inputs.items()}
        found = idle_experts(result.inputs, tokens)
        for entry in found[:_NAMED]:
            count = entry["tokens"]
            saw = "saw no token" if not count else f"saw {count} token{'s' * (count != 1)}"
            sentences.append(
                f"{entry['expert']} {saw} (set {one.name}); an even share is {entry['even']:.0f}."
            )
        if len(found) > _NAMED:
            none = sum(1 for entry in found if not entry["tokens"])
            sentences.append(
                f"{len(found)} experts saw less than a tenth of an even share, {none} of them "
                f"nothing (set {one.name})."
            )
    return sentences


def mean_of(result: Result, pair: tuple[str, str], measure: str, part: str = ALL) -> float | None:
    """Return the mean of a measure over the inputs, None without any."""
    found = [parts.get(part, {}).get(measure) for parts in result.pairs.get(pair, {}).values()]
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if known else None


def halves_of(one: OfSet, measure: str) -> float | None:
    """Return the mean of a measure between halves of one set."""
    known = [v for parts in one.halves.values() if (v := parts.get(measure)) is not None]
    return statistics.fmean(known) if known and one.calibration.nsamples > 1 else None


def _pairs(result: Result) -> list[str]:
    sentences = []
    for (a, b), inputs in result.pairs.items():
        overlap, own = mean_of(result, (a, b), "jaccard"), halves_of(result.sets[a], "jaccard")
        if overlap is None:
            continue
        known = [
            (value, name)
            for name, parts in inputs.items()
            if (value := parts.get(ALL, {}).get("jaccard")) is not None
        ]
        low, name = min(known)
        beside = "" if own is None else f" (halves of {a}: {own:.2f})"
        rank = mean_of(result, (a, b), "spearman")
        angle = mean_of(result, (a, b), "angles")
        more = [] if rank is None else [f"rank correlation of channel energies {rank:.2f}"]
        more += [] if angle is None else [f"distance of leading subspaces {angle:.2f} of 1"]
        sentences.append(
            f"The 1 % of channels with the largest inputs overlap {overlap:.2f} between {a} and {b}"
            f"{beside}; least at {name} ({low:.2f}). {'; '.join(more).capitalize()}."
        )
    return sentences


def _verdict(result: Result) -> list[str]:
    """Say whether the choice of the set shows, with the halves of a set to judge by."""
    first = next(iter(result.sets))
    return [_of_pair(result, names) for names in result.pairs if names[0] == first]


def _of_pair(result: Result, names: tuple[str, str]) -> str:
    a, b = names
    told, differs = [], []
    for measure, what, matters in (
        ("energy_shift", "typical sizes of channels", "how weights are pruned and rounded"),
        ("range_shift", "largest values of channels", "static ranges of inputs"),
    ):
        apart = mean_of(result, names, measure)
        halves = [halves_of(result.sets[name], measure) for name in names]
        own = max((value for value in halves if value is not None), default=None)
        if apart is None:
            continue
        beside = "" if own is None else f" ({math.exp(own):.2f} between halves of one set)"
        told.append(f"{what} differ by a factor of {math.exp(apart):.2f}{beside}")
        if own is not None and apart > _FAR * own and apart > _TENTH:
            differs.append(matters)
    if not told:
        return f"{a} and {b} reach no layer in common."
    if differs:
        verdict = (
            f"{a} and {b} look different to this model, which matters for {' and '.join(differs)}"
        )
    else:
        verdict = f"{a} and {b} look much the same to this model"
    return f"{verdict}: {', '.join(told)}."


def _db(value: float | None) -> str:
    return "nothing" if value is None else "no loss" if math.isinf(value) else f"{value:.1f} dB"


def _some(values: Sequence[int], most: int = 6) -> str:
    shown = ", ".join(map(str, values[:most]))
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
