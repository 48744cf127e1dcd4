"""The report of an inspection: findings first, then tables and plots, and plain values of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from lm_calib_plugin.diagnostics.activations import figures, tables
from lm_calib_plugin.diagnostics.activations.findings import dead_channels, findings
from lm_calib_plugin.diagnostics.activations.result import OfSet, Result
from lm_calib_plugin.diagnostics.document import Document, Section, Table

_MIB = 1 << 20


def document(
    result: Result, tokenizer: Any, model: str, facts: Mapping[str, Any] | None = None
) -> Document:
    """Return the report of an inspection.

    Parameters
    ----------
    result
        What was found.
    tokenizer
        To show tokens as text; None: by their ids.
    model
        What the model is called.
    facts
        More about the model, for the report and its JSON.
    """
    found = findings(result, tokenizer)
    return Document(
        f"Activations of {model}",
        found,
        {"model": model, **(facts or {}), **_facts(result)},
        [*_sets(result), *_pairs(result), *_special(result, tokenizer)],
        data(result, model, facts or {}, found),
    )


def data(result: Result, model: str, facts: Mapping[str, Any], found: list[str]) -> dict[str, Any]:
    """Return everything as plain values."""
    return {
        "model": {"name": model, **facts},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": result.settings,
        "findings": found,
        "inputs": [dataclasses.asdict(one) for one in result.inputs],
        "sets": {name: _plain_set(one) for name, one in result.sets.items()},
        "pairs": [
            {"sets": list(names), "inputs": inputs} for names, inputs in result.pairs.items()
        ],
        "rank_shares": result.rank_shares,
        "dead_channels": dead_channels(result),
        "passes": result.passes,
        "without_gram": result.left_out,
        "warnings": result.warnings,
        "seconds": result.seconds,
    }


def _plain_set(one: OfSet) -> dict[str, Any]:
    stream = one.stream
    assert stream is not None
    return {
        "calibration": one.calibration.summary(),
        "inputs": one.inputs,
        "halves": one.halves,
        "outlier_features": one.features,
        "massive": [dataclasses.asdict(m) for m in one.massive],
        "residual_stream": {
            "massive_by_level": stream.counts.sum(2).tolist(),
            "massive_by_channel": {
                str(j): stream.counts[:, :, j].sum(1).tolist()
                for j in stream.counts.sum((0, 1)).nonzero()[:, 0].tolist()
            },
            "max_by_level": stream.peaks.tolist(),
            "median_by_level": [stream.median(level) for level in range(stream.peaks.shape[1])],
        },
        "unplaced": one.unplaced,
    }


def _facts(result: Result) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, one in result.sets.items():
        made = one.calibration
        facts[f"set {name}"] = (
            f"{made.nsamples} sequences of at most {made.seqlen} tokens, {made.tokens} in all; "
            f"calib_id {made.calib_id[:12]}"
        )
        if made.weights is not None:
            facts[f"weights of {name}"] = "not used here: every token counts once"
        if one.unplaced:
            facts[f"unplaced in {name}"] = (
                f"{one.unplaced} rows do not tell their token: they stand with the tokens behind "
                "the first"
            )
    blocks = len({one.block for one in result.inputs})
    layers = sum(len(one.layers) for one in result.inputs)
    facts["inputs"] = f"{len(result.inputs)} of {layers} layers in {blocks} blocks"
    facts["rounding"] = f"measured on {result.settings['sample_rows']} sampled rows of each input"
    limit = result.settings["gram_bytes"]
    grams = f"{result.passes} passes, at most {limit // _MIB:,} MiB of Gram matrices at a time"
    facts["passes"] = grams.replace("1 passes", "1 pass") if limit else "1 pass, no Gram matrices"
    if result.left_out:
        facts["no Gram matrix"] = (
            f"{len(result.left_out)} inputs, for which there is no room (--gram-memory): "
            + ", ".join(result.left_out[:4])
            + ", ..." * (len(result.left_out) > 4)
        )
    for number, warning in enumerate(result.warnings):
        facts[f"warning {number + 1}"] = warning
    facts["seconds"] = f"{result.seconds:.1f}"
    return facts


def _sets(result: Result) -> list[Section]:
    drawn = [figures.magnitude(result), *figures.histograms(result)]
    rounded = [figures.rounding(result), figures.formats(result)]
    sets = list(result.sets.values())
    first = sets[0].name
    return [
        Section(
            f"Size of the inputs, set {first}", tables=[tables.magnitudes(sets[0])], figures=drawn
        ),
        Section(
            f"Rounding of the inputs, set {first}",
            tables=[tables.roundings(sets[0])],
            figures=rounded,
        ),
        *(
            Section(
                f"Size and rounding, set {one.name}",
                tables=[tables.magnitudes(one), tables.roundings(one)],
            )
            for one in sets[1:]
        ),
    ]


def _pairs(result: Result) -> list[Section]:
    sections = []
    for number, names in enumerate(result.pairs):
        drawn = [figures.overlap(result)] if not number else []
        title = f"{names[0]} and {names[1]}"
        sections.append(Section(title, tables=[tables.pair(result, names)], figures=drawn))
    return sections


def _special(result: Result, tokenizer: Any) -> list[Section]:
    found: list[tuple[str, Table]] = [
        ("Massive activations", tables.massive(result, tokenizer)),
        ("Outlier channels", tables.channels(result)),
        ("Outlier features", tables.features(result)),
        ("Experts with few tokens", tables.experts(result)),
    ]
    stream = [
        Section(f"Residual stream, set {name}", tables=[tables.levels(one)])
        for name, one in result.sets.items()
    ]
    return [*(Section(title, tables=[table]) for title, table in found if table.rows), *stream]
