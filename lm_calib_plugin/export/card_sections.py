"""The sections of a model card that a report tells: recipe, calibration data, fidelity."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lm_calib_plugin.calibration.set_folder import licences
from lm_calib_plugin.export import card_papers
from lm_calib_plugin.export.card_text import cell, code, plain, table
from lm_calib_plugin.export.options import CALIBRATION, RECIPE, REPORT
from lm_calib_plugin.export.published import publishable
from lm_calib_plugin.report import Report

# Fields of a recipe, as they are named in the card; the rest stands in recipe.yaml.
_STRENGTH = {
    "sparsity": "Fraction removed",
    "pattern": "Pattern",
    "sublayer": "Taken out",
    "scheme": "Scheme",
    "bits": "Bits of a weight",
    "grid": "Levels",
    "group_size": "Weights that share a scale",
    "symmetric": "Symmetric levels",
    "act_bits": "Bits of an input",
    "act_dynamic": "Range of inputs taken while it runs",
    "kv_bits": "Bits of keys and values",
    "transform": "Transform before rounding",
    "rounding": "Rounding",
    "allocation": "Allocation to layers",
    "score": "Score",
    "refine": "Refinement",
    "update": "Update of kept weights",
    "correction": "Correction",
    "propagate": "Inputs of later blocks",
    "damp": "Ridge",
    "targets": "Layers, by name",
    "ignore": "Left out, by name",
    "untie": "Output head untied",
}


def strengths(report: Report) -> list[str]:
    """Return what a title says of how much was done."""
    recipe, got = report.recipe, report.achieved
    said = []
    if recipe.get("scheme"):
        said.append(str(recipe["scheme"]))
    elif got.get("bits") is not None and quantized(report):
        said.append(f"{got['bits']:.3g} bits")
    if pruned(report):
        pattern = recipe.get("pattern")
        odd = pattern not in (None, "unstructured")
        said.append(f"{pattern}" if odd else f"{got['sparsity']:.0%} removed")
    return said


def pruned(report: Report) -> bool:
    """Tell whether weights were removed."""
    return report.recipe.get("sparsity") is not None or report.structure is not None


def quantized(report: Report) -> bool:
    """Tell whether weights or inputs are on levels."""
    named = any(report.recipe.get(name) is not None for name in ("bits", "scheme", "act_bits"))
    return named or bool(report.grids)


def recipe_section(report: Report, facts: Mapping[str, Any]) -> str:
    """Return the table of the recipe."""
    recipe = publishable(report.recipe)
    rows = [["Method", card_papers.method_cell(str(recipe["method"]))]]
    for name, label in _STRENGTH.items():
        value = recipe.get(name)
        if value not in (None, "none", False, []) or (name == "symmetric" and value is False):
            rows.append([label, cell(_shown(value))])
    count = f"{len(report.layers)} compressed"
    if report.structure is not None:
        removed = report.structure["removed"]
        rows.append(["Taken out", ", ".join(map(cell, removed)) or "nothing"])
    else:
        rows.append(["Layers", f"{count}, {len(report.left_dense)} left dense"])
    reasons: dict[str, int] = {}
    for _, why in report.left_dense:
        reasons[why] = reasons.get(why, 0) + 1
    rows += [["Left dense", f"{n} matrices: {plain(why)}"] for why, n in reasons.items()]
    rows.append(["Stored as", cell(facts.get("format", "dense"))])
    return table(["", ""], rows) + (
        f"\n\nAll of it stands in `{RECIPE}`; every layer in `{REPORT}`. "
        "`lm-calib show FOLDER/recipe.yaml` explains it."
    )


def sources(report: Report) -> list[dict[str, Any]]:
    """Return the records of the sources of the calibration set."""
    return list((report.calibration or {}).get("sources", ()))


def expression(report: Report) -> str:
    """Return the calibration expression, without folders of this machine."""
    given = report.recipe.get("calibration")
    if not isinstance(given, str):
        given = "+".join(str(s.get("source")) for s in sources(report))
    return str(publishable(given))


def calibration_section(report: Report) -> str:
    """Return what is said of the calibration set."""
    calibration = report.calibration
    if not calibration:
        return "None: this method looks at weights alone."
    records = publishable(sources(report))
    rows = [
        ["Expression", cell(expression(report))],
        ["Identity (calib_id)", cell(calibration["calib_id"])],
        [
            "Sequences",
            f"{calibration['nsamples']} of at most {calibration['seqlen']} tokens, "
            f"{calibration['tokens']} tokens in all, "
            f"{calibration.get('heldout_sequences', 0)} held out",
        ],
        ["Seed", cell(report.recipe.get("calib_seed", 0))],
    ]
    lines = [table(["", ""], rows), "Sources, and what is known of their licenses:"]
    lines.append("\n".join(f"- {plain(note)}" for note in licences(records)) or "- none named")
    written = [s for s in card_papers.every_source(records) if _by_itself(s)]
    if written:
        lines.append(
            "**The text of "
            + ", ".join(dict.fromkeys(code(s["source"]) for s in written))
            + " was written by the dense base model itself**: no outside text was used for it."
        )
    lines.append(f"`{CALIBRATION}` tells where each sequence comes from.")
    return "\n\n".join(lines)


def _by_itself(source: Mapping[str, Any]) -> bool:
    return re.match(r"self\b", str(source.get("source", ""))) is not None


def fidelity_section(report: Report) -> str:
    """Return errors, fractions of zeros, bits and bytes."""
    got, error = report.achieved, report.error()
    rows = []
    for kind, label in (("calibration", "calibration"), ("heldout", "held-out")):
        found = error[kind]
        if not found:
            continue
        if "last_hidden" in found:
            rows.append(
                [f"Error of the last hidden state, {label} text", f"{found['last_hidden']:.4g}"]
            )
            continue
        rows.append([f"Median error of a layer, {label} text", f"{found['median']:.4g}"])
        rows.append(
            [
                f"Worst error of a layer, {label} text",
                f"{found['worst']:.4g} ({cell(found['worst_layer'])})",
            ]
        )
    for name, label in (
        ("sparsity", "Zeros in the compressed layers"),
        ("sparsity_blocks", "Zeros in the decoder blocks"),
        ("sparsity_model", "Zeros in the whole model"),
    ):
        if got.get(name) is not None and (pruned(report) or name == "sparsity"):
            said = label.replace("Zeros in", "Removed of") if report.structure else label
            rows.append([said, f"{got[name]:.2%}"])
    if quantized(report) and got.get("bits") is not None:
        rows.append(["Bits of a weight", f"{got['bits']:.4g}"])
    if got.get("bits_stored") is not None:
        rows.append(["Bits of a weight with scales", f"{got['bits_stored']:.4g}"])
        rows.append(["Bytes of the compressed layers, packed", f"{got['bytes']:,}"])
    if got.get("parameters"):
        before, after = got["parameters"]["model"]
        rows.append(["Parameters", f"{before:,} before, {after:,} after"])
    return table(["Measured on the model that was evaluated", ""], rows) + (
        "\n\nErrors are relative squared output errors, given the same input. They say how well "
        "layers are kept, not how well tasks are solved."
    )


def _shown(value: Any) -> str:
    if value is True or value is False:
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
