"""What the answers of two models are shown as: errors of calibration, and reliability diagrams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_calib_plugin.diagnostics.answers import Answers, compare, pooled
from lm_calib_plugin.diagnostics.document import Document, Figure, Section, Table
from lm_calib_plugin.drawing import canvas
from lm_calib_plugin.drawing.svg import Palette

MODELS = ("dense", "compressed")
_DRAWN = 6  # tasks with a diagram; the JSON file has the bins of all


def document(
    dense: str, compressed: str, tasks: Sequence[Answers], bins: int, version: str
) -> Document:
    """Return the report of the answers to some tasks.

    Parameters
    ----------
    dense, compressed
        What was read.
    bins
        Of equal width, and of equal mass.
    """
    some = [task for task in tasks if task.items]
    whole = [pooled(some), *some] if len(some) > 1 else some
    rows = {one.task: compare(one, bins) for one in whole}
    left = {one.task: one.left for one in tasks if one.left}
    findings = [_finding(task, row) for task, row in rows.items()]
    findings += [
        f"{task}: {count} items are not counted: {reason}."
        for task, reasons in left.items()
        for reason, count in reasons.items()
    ]
    facts = {
        "dense": dense,
        "compressed": compressed,
        "bins": f"{bins}, of equal width from 0 to 1, and of equal mass",
        "version": version,
    }
    data = {**facts, "bins": bins, "tasks": rows, "left": left}
    sections = [_overview(rows), _changes(rows), *_diagrams(rows)]
    return Document("Calibration of answers", findings, facts, sections, data)


def _finding(task: str, row: Mapping[str, Any]) -> str:
    change = row["ece_change"]
    dense, compressed = (row[name] for name in MODELS)
    if row["changed"] == 0 and dense == compressed:
        return f"{task}: both models are equally sure of the same answers to {row['items']} items."
    if change["low"] > 0 or change["high"] < 0:
        verdict = "worse" if change["value"] > 0 else "better"
        what = f"the confidence of the compressed model is {verdict} calibrated"
    else:
        what = "no change of calibration is seen above the noise of the items"
    sure = compressed["confidence"] - compressed["accuracy"]
    return (
        f"{task}: {what}: ECE {dense['ece']:.3f} -> {compressed['ece']:.3f} (difference "
        f"{change['value']:+.3f}, 95 % {change['low']:+.3f} to {change['high']:+.3f}, "
        f"{row['items']} items); it is {compressed['accuracy']:.1%} right and "
        f"{compressed['confidence']:.1%} sure ({'over' if sure > 0 else 'under'}confident by "
        f"{abs(sure):.1%}; the dense model {dense['accuracy']:.1%} and "
        f"{dense['confidence']:.1%}); {row['changed']} answers changed."
    )


def _overview(rows: Mapping[str, Any]) -> Section:
    names = ("ece", "ece_equal_mass", "accuracy", "confidence", "brier")
    table = Table(
        ["task", "items", "model", "ECE", "ECE, equal mass", "accuracy", "confidence", "Brier"],
        [
            [task, row["items"], model, *(row[model][name] for name in names)]
            for task, row in rows.items()
            for model in MODELS
        ],
        "ECE: mean gap of accuracy and confidence, over bins of confidence. Confidence: the share "
        "of the best answer (softmax of the summed log-likelihoods of the answers). Brier: sum "
        "over answers of the squared gap of probability and truth. ECE of few items is too large "
        "by chance, for both models alike.",
    )
    return Section("Both models", (), [table])


def _changes(rows: Mapping[str, Any]) -> Section:
    table = Table(
        ["task", "change of", "value", "low", "high", "answers changed"],
        [
            [task, name, *row[f"{name}_change"].values(), row["changed"]]
            for task, row in rows.items()
            for name in ("ece", "accuracy", "confidence", "brier")
        ],
        "Compressed minus dense, with 95 % intervals: bootstrap over items, the same for both. ECE "
        "with bins of equal width.",
    )
    return Section("What changed", (), [table])


def _diagrams(rows: Mapping[str, Any]) -> Iterator[Section]:
    for task, row in list(rows.items())[:_DRAWN]:
        bins = Table(
            ["model", "from", "to", "items", "confidence", "accuracy"],
            [
                [model, *(part[k] for k in ("from", "to", "items", "confidence", "accuracy"))]
                for model in MODELS
                for part in row[model]["reliability"]
            ],
            "By confidence.",
            shown=10,
        )
        parts = {model: row[model]["reliability"] for model in MODELS}
        figure = Figure(
            f"Reliability {task}",
            "Accuracy (vertical) of the answers that the model was that sure of (horizontal); the "
            "larger a point, the more items. Below the dashed line the model is too sure.",
            "; ".join(f"{model}: ECE {row[model]['ece']:.3f}" for model in MODELS),
            lambda colors, parts=parts, task=task: reliability_diagram(parts, task, colors),
        )
        yield Section(f"Reliability: {task}", (), [bins], [figure])


def reliability_diagram(
    parts: Mapping[str, Sequence[Mapping[str, Any]]], task: str, colors: Palette
) -> Any:
    """Draw accuracy against confidence, a line a model."""
    figure, axis = canvas.new_figure(3.4, "Reliability", task, colors)
    most = max((part["items"] for own in parts.values() for part in own), default=1)
    axis.plot([0, 1], [0, 1], color=colors["muted"], linewidth=1, linestyle="--")
    for number, (model, own) in enumerate(parts.items()):
        x, y = ([part[name] for part in own] for name in ("confidence", "accuracy"))
        color = colors.series(number)
        axis.plot(x, y, color=color, linewidth=1.2, label=canvas.label(model))
        sizes = [8 + 60 * part["items"] / most for part in own]
        axis.scatter(x, y, s=sizes, color=color, linewidths=0, clip_on=False, zorder=3)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_xlabel("confidence")
    axis.set_ylabel("accuracy")
    axis.grid(color=colors["grid"], linewidth=0.7)
    axis.set_axisbelow(True)
    canvas.legend(figure, axis, colors)
    return figure
