"""The model card of an exported folder: what it is, how it was made, how good it is.

Every value, whoever typed it, is written so that it can not break out of its place. A card is
published: of the paths of this machine only the last part is named.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from lm_calib_plugin.export import card_papers
from lm_calib_plugin.export.base_model import base_license as base_license
from lm_calib_plugin.export.base_model import hub_name, shown_name
from lm_calib_plugin.export.card_results import model_index, results_table, scores
from lm_calib_plugin.export.card_sections import (
    calibration_section,
    expression,
    fidelity_section,
    pruned,
    quantized,
    recipe_section,
    sources,
    strengths,
)
from lm_calib_plugin.export.card_text import (
    block,
    cell,
    code,
    front_matter,
    one_line,
    plain,
    table,
)
from lm_calib_plugin.export.options import FILES, RECIPE, Provenance
from lm_calib_plugin.export.published import publishable
from lm_calib_plugin.report import Report

# What loads a format, beside transformers.
LOADERS = {"compressed-tensors": ("compressed-tensors",), "gptq": ("optimum", "gptqmodel")}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def model_card(
    report: Report,
    provenance: Provenance,
    facts: Mapping[str, Any],
    dense: Mapping[str, Any] | None = None,
) -> str:
    """Return the card of a folder as Markdown, with the block that the hub reads first.

    Parameters
    ----------
    report, provenance
        What was done to which model. ``provenance.results`` is a results file of lm_eval, or its
        ``results`` alone.
    facts
        ``format`` and ``check`` as :func:`~lm_calib_plugin.export.folder.export_model` knows them.
    dense
        Results of the same tasks for the base model, to stand beside.

    Raises
    ------
    UserError
        When results are not those of lm_eval.
    """
    found = scores(provenance.results or {})
    parts = [
        front_matter(
            _metadata(report, provenance, facts, model_index(_title(report, provenance), found))
        ),
        f"# {plain(_title(report, provenance))}",
        _what(report, provenance, facts),
        f"## Recipe\n\n{recipe_section(report, facts)}",
        f"## Calibration data\n\n{calibration_section(report)}",
        f"## How far it is from the dense model\n\n{fidelity_section(report)}",
    ]
    if found:
        before = scores(dense or {})
        said = "Measured with lm-evaluation-harness."
        parts.append(f"## Results\n\n{said}\n\n{results_table(found, before)}")
    parts += [
        f"## Use\n\n{_use(provenance, facts)}",
        f"## What to know\n\n{_notes(report, facts)}",
        f"## How it was made\n\n{_made(report, provenance, facts)}",
        f"## Papers\n\n{card_papers.papers(report.recipe)}",
    ]
    return "\n\n".join(parts) + "\n"


def _title(report: Report, provenance: Provenance) -> str:
    name = shown_name(provenance.pretrained).rpartition("/")[2]
    merged = "".join(f" + {shown_name(a).rpartition('/')[2]}" for a in provenance.adapters)
    return f"{name}{merged} {report.recipe['method']} {' '.join(strengths(report))}"


def _metadata(
    report: Report,
    provenance: Provenance,
    facts: Mapping[str, Any],
    index: list[dict[str, Any]],
) -> dict[str, Any]:
    bases = list(filter(None, map(hub_name, (provenance.pretrained, *provenance.adapters))))
    values: dict[str, Any] = {}
    if bases:
        # The hub has no word for pruned; it takes a model of other weights as fine-tuned.
        relation = "quantized" if quantized(report) else "finetune"
        values |= {
            "base_model": bases if len(bases) > 1 else bases[0],
            "base_model_relation": relation,
        }
    values |= _license(provenance.license)
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    values["tags"] = ["lm-calib-plugin"]
    values["tags"] += ["pruned"] if pruned(report) else []
    values["tags"] += ["quantized"] if quantized(report) else []
    values["tags"] += [facts["format"]] if facts.get("format") in LOADERS else []
    datasets = card_papers.hub_datasets(sources(report))
    if datasets:
        values["datasets"] = datasets
    if index:
        values["model-index"] = index
    return values


def _license(found: str | None) -> dict[str, Any]:
    if found is None:
        return {"license": "other", "license_name": "that-of-the-base-model"}
    if _LICENSE.fullmatch(found) and found != "other":
        return {"license": found}
    name = re.sub(r"[^a-z0-9.]+", "-", found.lower().removeprefix("other ")).strip("-.")
    return {"license": "other", "license_name": name or "that-of-the-base-model"}


def _what(report: Report, provenance: Provenance, facts: Mapping[str, Any]) -> str:
    done = [
        word
        for word, is_so in (("pruned", pruned(report)), ("quantized", quantized(report)))
        if is_so
    ]
    base = code(shown_name(provenance.pretrained))
    at = f" at revision {code(provenance.revision)}" if provenance.revision else ""
    merged = " and ".join(code(shown_name(name)) for name in provenance.adapters)
    merged = f" with {merged} merged into it" if merged else ""
    how = ", ".join(strengths(report))
    calibration = report.calibration
    data = "without calibration data"
    if calibration:
        data = (
            f"with {calibration['nsamples']} calibration sequences from {code(expression(report))}"
        )
    stored = (
        f"Its weights are packed levels ({facts['format']})."
        if facts.get("format") in LOADERS
        else "Its weights are ordinary numbers."
    )
    license_ = "not known to the program that wrote this card"
    if provenance.license:
        license_ = code(provenance.license)
    if merged:
        license_ += "; of what was merged into it: not known"
    return (
        f"{base}{at}{merged}, {' and '.join(done) or 'compressed'} with the method "
        f"{code(report.recipe['method'])}{f' ({plain(how)})' if how else ''}, {data}, by "
        "[lm-calib-plugin](https://pypi.org/project/lm-calib-plugin/). "
        f"{stored} License of the base model: {license_}."
    )


def _use(provenance: Provenance, facts: Mapping[str, Any]) -> str:
    more = ", trust_remote_code=True" if provenance.trust_remote_code else ""
    needs = " and ".join(["transformers", *LOADERS.get(facts.get("format", ""), ())])
    python = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto"{more})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{more})'
    )
    shell = (
        f"lm_eval --model hf --model_args {_model_args(provenance)} --tasks TASK\n"
        "lm-calib inspect FOLDER   # is every file whole?"
    )
    return f"FOLDER is this folder. With {needs} alone:\n\n{block(python, 'python')}\n\n" + block(
        shell, "bash"
    )


def _model_args(provenance: Provenance) -> str:
    """Return what gives the scores of the evaluated model, as one word of a shell."""
    given = {"pretrained": "FOLDER"}
    given |= {k: v for k, v in publishable(provenance.model_args).items() if k not in given}
    if provenance.trust_remote_code:
        given["trust_remote_code"] = True
    texts = {name: one_line(value) for name, value in given.items()}
    if any(set(",=") & set(text) for text in texts.values()) or any(
        isinstance(value, (dict, list)) for value in given.values()
    ):
        return shlex.quote(one_line(json.dumps(given)))
    return shlex.quote(",".join(f"{name}={text}" for name, text in texts.items()))


def _notes(report: Report, facts: Mapping[str, Any]) -> str:
    packed = facts.get("format") in LOADERS
    notes = []
    if report.structure is not None:
        notes.append("What was taken out is gone: the model is smaller and runs faster everywhere.")
    elif pruned(report):
        notes.append(
            "Zeros are stored like other numbers: memory and speed are those of the dense model in "
            "transformers and other common runtimes."
            + ("" if packed else " `lm-calib pack` makes the folder smaller on disk.")
        )
    if packed:
        notes.append(
            "Packed levels are smaller on disk; in transformers the model is not faster than the "
            "dense one. Runtimes with kernels of their own may be, and may round otherwise."
        )
    elif quantized(report):
        notes.append(
            "Weights lie on their levels but are stored as ordinary numbers: neither smaller nor "
            "faster."
        )
    if report.achieved.get("symmetric_scale"):
        notes.append(
            f"Scales of symmetric levels are {code(report.achieved['symmetric_scale'])}; other "
            "libraries divide by another number."
        )
    if facts.get("format") == "gptq":
        notes.append(
            "On a CPU, transformers runs 4-bit levels with a kernel that computes in bfloat16; for "
            "other widths it makes weights in float16."
        )
    notes += [_check(facts.get("check"))]
    notes += [f"Warning: {plain(publishable(note))}" for note in report.warnings]
    return "\n".join(f"- {note}" for note in notes)


def _check(check: Mapping[str, Any] | None) -> str:
    if not check:
        return "The folder was not loaded back and compared when it was written."
    if not check.get("loaded", True):
        return (
            f"The folder was not loaded back when it was written ({plain(check['why'])}): "
            f"{check['tensors']} tensors were read from its files and unpacked, and equal bit for "
            "bit what was evaluated."
        )
    said = f"Loaded back with plain transformers {plain(check.get('transformers', ''))}"
    said += f", {check['tensors']} tensors were equal bit for bit"
    if check.get("exact"):
        return f"{said}, and so were the logits."
    said += f"; logits differed by {check['logits_difference']:.2g} of their norm"
    if "rounded" in check:
        said += (
            f" (outputs of single layers by {check['layers']:.2g} at most); gptqmodel "
            f"{plain(check.get('gptqmodel') or '')} rounds {check['rounded']} weights otherwise"
        )
    elif check.get("layers"):
        said += f", outputs of single layers by {check['layers']:.2g} at most (rounded inputs)"
    return said + "."


def _made(report: Report, provenance: Provenance, facts: Mapping[str, Any]) -> str:
    parts = []
    if provenance.command:
        parts.append(block(str(publishable(provenance.command)), "bash"))
    else:
        parts.append(f"By Python, with the recipe in `{RECIPE}`.")
    versions = ", ".join(f"{plain(k)} {plain(v)}" for k, v in report.versions.items())
    rows = [
        ["Recipe key", cell(report.key)],
        ["Weights, after", cell(report.weights_digest)],
        ["Model, before", cell(report.model_digest)],
        ["Versions", versions],
    ]
    for package in LOADERS.get(facts.get("format", ""), ()):
        if facts.get("check") and facts["check"].get(package):
            rows.append([package, plain(facts["check"][package])])
    parts.append(table(["", ""], rows))
    parts.append(f"`{FILES}` holds size and sha256 of every file.")
    return "\n\n".join(parts)
