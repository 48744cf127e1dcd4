"""The report on the layers of a run: findings, tables, pictures, and all of it as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from lm_calib_plugin.accounting import versions
from lm_calib_plugin.diagnostics.document import Document, Figure, Section, Table
from lm_calib_plugin.diagnostics.layers import figures, reasons
from lm_calib_plugin.diagnostics.layers.depths import Propagation
from lm_calib_plugin.diagnostics.layers.diagnosis import Diagnosis
from lm_calib_plugin.diagnostics.layers.evidence import (
    CALIBRATION,
    HELDOUT,
    TEXT,
    Layer,
)
from lm_calib_plugin.diagnostics.layers.findings import Group, findings, groups
from lm_calib_plugin.diagnostics.layers.measuring import Measured
from lm_calib_plugin.diagnostics.pair import recipe_words
from lm_calib_plugin.diagnostics.tokens import TokenDivergence

_ON = (CALIBRATION, HELDOUT, TEXT)
_HEAD = ("calibration", "held out", "text")
_MEANING = (
    "Relative squared errors of outputs, ||X (W' - W)^T||^2 / ||X W^T||^2: calibration and held "
    "out are those of the report, with the inputs of the run; text is measured with the inputs of "
    "the dense model, rounded where the compressed model rounds them."
)


def document(found: Diagnosis) -> Document:
    """Return everything that was found as a report."""
    sections = [_where(found), _travel(found), _over_fit(found), _worst(found)]
    return Document(
        f"Layers of {_name(found)}",
        findings(found),
        _facts(found),
        [section for section in sections if section is not None],
        _data(found),
    )


def _name(found: Diagnosis) -> str:
    run = found.run
    what = run.place.name if run.recipe is None else run.recipe.method
    base = found.opened.dense_name if found.opened else run.pretrained
    return f"{base} under {what}" if base else what


def _facts(found: Diagnosis) -> dict[str, Any]:
    run, opened = found.run, found.opened
    facts: dict[str, Any] = {"run": run.place, "key": run.key[:16]}
    if run.recipe is not None:
        facts["recipe"] = recipe_words(run.recipe)
    if run.calibration is not None:
        facts["calibration set"] = (
            f"{run.calibration.get('nsamples')} x {run.calibration.get('seqlen')} tokens, "
            f"{str(run.calib_id)[:12]}"
        )
    if opened is not None:
        facts |= {
            "dense": opened.dense_name,
            "compressed": opened.name,
            "text": f"{_sources(opened.text.summary())} ({opened.text.nsamples} x "
            f"{opened.text.seqlen} tokens, {opened.text.calib_id[:12]})",
            "calibration looked at": f"{sum(map(len, opened.calibration))} tokens",
        }
    return facts | {"versions": ", ".join(f"{k} {v}" for k, v in versions().items())}


def _sources(summary: Mapping[str, Any]) -> str:
    return "+".join(str(one.get("source")) for one in summary.get("sources") or ())


def _where(found: Diagnosis) -> Section | None:
    if not found.layers:
        return None
    kinds, blocks = (
        groups(found, lambda layer: layer.kind),
        groups(found, lambda layer: layer.block),
    )
    picture = figures.by_kind(kinds, found.basis)
    share = "share: part of the sum of relative errors of all layers."
    return Section(
        "Where the error arises",
        (),
        [
            _grouped("kind", kinds, f"Means by kind of layer; {share} {_MEANING}"),
            _grouped("block", blocks, f"Means by block; {share}", shown=12),
        ],
        _drawn(picture),
    )


def _grouped(name: str, found: list[Group], caption: str, shown: int = 20) -> Table:
    rows = [[g.name, g.count, *(g.means[on] for on in _ON), g.share] for g in found]
    return Table([name, "layers", *_HEAD, "share"], rows, caption, shown)


def _travel(found: Diagnosis) -> Section | None:
    trace = found.propagation
    if trace is None or not trace.aligned:
        return None
    added = trace.added()
    rows = [
        [
            index,
            depth.relative("local"),
            depth.relative("free"),
            total,
            depth.relative("free") / total if total > 0 else None,
            depth.relative("local", rest=True),
            depth.relative("free", rest=True),
        ]
        for index, (depth, total) in enumerate(zip(trace.depths, added, strict=True))
    ]
    table = Table(
        [
            "block",
            "teacher-forced",
            "free",
            "sum of local",
            "free / sum",
            "teacher-forced, rest",
            "free, rest",
        ],
        rows,
        "Relative squared errors of the hidden states behind each block; rest: without the first "
        "token of every sequence, whose states are often far larger than all others.",
        12,
    )
    return Section("How the error travels", (), [table], _drawn(figures.by_depth(trace)))


def _over_fit(found: Diagnosis) -> Section | None:
    if not found.layers:
        return None

    def order(layer: Layer) -> float:
        return -max(layer.over_fit().values(), default=0.0)

    rows = [
        [
            x.name,
            round(x.row.removed, 4),
            x.row.bits,
            x.row.tokens,
            *(x.errors[on] for on in _ON),
            x.over_fit().get(HELDOUT),
            x.over_fit().get(TEXT),
        ]
        for x in sorted(found.layers, key=order)
    ]
    head = ["layer", "removed", "bits", "tokens", *_HEAD, "held out / cal.", "text / cal."]
    table = Table(
        head,
        rows,
        "All layers, those first whose error grows most off the calibration set. held out / cal.: "
        "both of the report; text / cal.: weights alone, both with the inputs of the dense model.",
        5,
    )
    return Section(
        "Calibration against other data",
        (),
        [table],
        _drawn(figures.against_calibration(found.layers)),
    )


def _worst(found: Diagnosis) -> Section | None:
    if not found.worst:
        return None
    rows = [
        [layer.name, layer.errors[found.basis], layer.text and layer.text.of_inputs,
         reasons.in_words(why)]
        for layer, why in found.worst
    ]  # fmt: skip
    caption = (
        f"Errors on {figures.NAMES[found.basis]}; by inputs: what rounding the inputs alone does."
    )
    head = ["layer", "error", "by inputs", "why"]
    if all(row[2] is None for row in rows):
        head, rows = [*head[:2], head[3]], [[*row[:2], row[3]] for row in rows]
        caption = caption.partition(";")[0] + "."
    return Section("Worst layers", (), [Table(head, rows, caption)])


def _drawn(figure: Figure | None) -> list[Figure]:
    return [] if figure is None else [figure]


def _data(found: Diagnosis) -> dict[str, Any]:
    run, opened = found.run, found.opened
    data: dict[str, Any] = {
        "run": str(run.place),
        "kind": run.kind,
        "key": run.key,
        "recipe": None if run.recipe is None else run.recipe.to_metadata(),
        "calibration": run.calibration,
        "model_digest": run.model_digest,
        "weights_digest": run.weights_digest,
        "versions": versions(),
        "findings": findings(found),
        "basis": found.basis,
        "layers": [_layer(layer) for layer in found.layers],
        "worst": [
            {"name": layer.name, "reasons": [asdict(reason) for reason in why]}
            for layer, why in found.worst
        ],
        "over_fitted": [
            {"name": layer.name, "on": on, "ratio": ratio} for layer, on, ratio in found.over_fitted
        ],
        "not_compared": sorted(found.unlike),
        "left_dense": [{"name": name, "why": why} for name, why in run.left_dense],
        "structure": run.structure,
    }
    if opened is not None:
        data |= {
            "dense": opened.dense_name,
            "compressed": opened.name,
            "text": opened.text.summary(),
            "calibration_tokens_looked_at": sum(map(len, opened.calibration)),
            "notes": list(opened.notes),
        }
    if found.propagation is not None:
        data["propagation"] = _propagation(found.propagation)
    return data


def _layer(layer: Layer) -> dict[str, Any]:
    told = {k: v for k, v in asdict(layer.row).items() if k not in ("seconds", "execution")}
    found = {"block": layer.block, "kind": layer.kind, **told, "over_fit": layer.over_fit()}
    for name, measured in (("text", layer.text), ("calibration_again", layer.calibration)):
        if measured is not None:
            found[name] = dict(_measured(measured))
    return found


def _measured(one: Measured) -> Iterator[tuple[str, Any]]:
    """Yield what was measured of a layer; of its channels those that say most."""
    seen = one.seen
    yield from (("error", one.total), ("error_weights", one.error), ("error_inputs", one.of_inputs))
    yield "tokens", seen.tokens
    if seen.tokens:
        yield "largest_channel", int(seen.amax.argmax())
        yield "largest", float(seen.amax.max())
        yield "median_channel", float(seen.amax.median())
        yield "never_active", int((seen.active == 0).sum())
    if one.values:
        yield "inputs_beyond_range", one.beyond / one.values


def _propagation(found: Propagation) -> dict[str, Any]:
    every = TokenDivergence.joined(found.tokens)
    return {
        "aligned": found.aligned,
        "free": found.curve("free"),
        "teacher_forced": found.curve("local") if found.aligned else None,
        "sum_of_teacher_forced": found.added() if found.aligned else None,
        "free_without_first_tokens": found.curve("free", rest=True),
        "teacher_forced_without_first_tokens": found.curve("local", rest=True)
        if found.aligned
        else None,
        "accumulated_over_sum": found.amplification(),
        "logit_error": found.logit_error(),
        "tokens": len(every),
        "js": float(every.js.mean()) if len(every) else None,
        "kl": float(every.kl.mean()) if len(every) else None,
        "flipped": float(every.flipped.mean()) if len(every) else None,
        "nll_dense": float(every.nll_dense.mean()) if len(every) else None,
        "nll_compressed": float(every.nll_compressed.mean()) if len(every) else None,
    }
