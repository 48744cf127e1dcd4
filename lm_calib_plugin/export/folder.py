"""Write a compressed model as an ordinary Hugging Face folder, whole or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lm_calib_plugin import engine, storage
from lm_calib_plugin.checks import check_whole
from lm_calib_plugin.engine.fingerprint import input_quantizers, packed_layers
from lm_calib_plugin.engine.layers import is_experts
from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.export import options as names
from lm_calib_plugin.export.architecture import described, plain_config
from lm_calib_plugin.export.card import model_card
from lm_calib_plugin.export.check import compare_beside, compare_with_folder, found_by_check
from lm_calib_plugin.export.formats import LEVELS, check_export, check_model
from lm_calib_plugin.export.older import for_older_readers
from lm_calib_plugin.export.options import ExportOptions, Provenance
from lm_calib_plugin.export.place import (
    check_out,
    is_there,
    recipe_text,
    size_of,
    sweep,
    told,
)
from lm_calib_plugin.export.published import publishable
from lm_calib_plugin.export.quantized import QuantizedLayer
from lm_calib_plugin.export.records import calibration_record, write_files_record
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import Report

# Configuration, tokenizer, records and the card.
OTHER_FILES = 64 << 20


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how it compares with the model in memory.

    ``check`` has ``tensors`` (compared bit by bit), ``logits_difference`` (relative, on random
    tokens) and the version of transformers that loaded the folder; None where it was not asked
    for.
    """

    folder: Path
    format: str
    bytes: int
    seconds: float
    check: dict[str, Any] | None
    was_there: bool = False

    def line(self) -> str:
        """Return one line for people."""
        size = f"{self.format}, {self.bytes / 2**20:.1f} MiB"
        if self.was_there:
            return f"{self.folder} ({size}) holds this very model already; nothing was written"
        parts = [f"exported to {self.folder} ({size})"]
        if self.check is None:
            parts.append("not loaded back")
        else:
            parts.append(found_by_check(self.check))
        return "; ".join([*parts, f"{self.seconds:.1f} s"])

    def summary(self) -> dict[str, Any]:
        """Return plain values for a results file."""
        return {
            "folder": str(self.folder),
            "format": self.format,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "check": self.check,
            "was_there": self.was_there,
        }


def export_model(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    report: Report,
    out: str | Path,
    options: ExportOptions | None = None,
    provenance: Provenance | None = None,
) -> ExportResult:
    """Write a compressed model to a new folder that plain transformers loads.

    The folder gets its name when it is whole and, with ``options.check``, when the model loaded
    from it has been found to be the one in memory.

    Parameters
    ----------
    model, tokenizer
        The compressed model, and the tokenizer as it came with the base model; None: no tokenizer
        files.
    recipe, report
        What was done, and what :func:`~lm_calib_plugin.compression.compress` returned.
    out
        The folder.

    Raises
    ------
    UserError
        When the folder can not be written, or no format holds the model.
    CalibError
        When the disk is full, or the loaded model is not the one in memory; nothing is left.
    """
    began = time.perf_counter()
    options, out = options or ExportOptions(), Path(out).expanduser()
    provenance = provenance or Provenance(str(getattr(model, "name_or_path", "")) or "a model")
    check_out(out, recipe, options.overwrite, asked=asked_of(provenance.pretrained, options))
    stored = check_export(recipe, options.format)
    check_whole(model, "export", "an export")
    if recipe.make_method().scope != "model" and not packed_layers(model):
        # Else layers were to be looked at before parts were taken out or kernels put in.
        check_model(model, recipe, options.format)
    if engine.weights_digest(model) != report.weights_digest:
        raise CalibError(
            "The weights have changed since they were compressed: the report does not describe "
            "the model that would be exported."
        )
    if out.exists() and not options.overwrite:
        facts = is_there(out, report)
        seconds = time.perf_counter() - began
        return ExportResult(out, stored, size_of(out), seconds, facts["check"], True)
    config, added = plain_config(model)
    how = LEVELS.get(stored)
    layers = [] if how is None else _quantized_layers(model, report)
    state, settings = dict(model.state_dict()) | added, None
    if how is not None and layers:
        _put_levels(state, layers, how.tensors)
        settings = how.settings(layers, _other_linears(model, layers))
    described(model, config, added)
    size = sum(t.numel() * t.element_size() for t in state.values())
    storage.require_space(out.absolute().parent, size + OTHER_FILES, out.name)
    facts: dict[str, Any] = {
        "key": report.key,
        "format": stored,
        "model_digest": report.model_digest,
        "weights_digest": report.weights_digest,
        "added": sorted(added),
        "check": None,
    } | publishable(asked_of(provenance.pretrained, options))
    with (
        told(out),
        left_as_found(model),
        storage.new_folder(out, replace=options.overwrite) as folder,
    ):
        sweep(out, folder)
        _write_model(model, config, state, settings, folder, options)
        del state
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for_older_readers(folder)
        if options.check:
            compare = compare_with_folder if how is None else how.compare
            facts["check"] = compare(model, layers, folder, provenance.trust_remote_code)
            compare_beside(model, tokenizer, folder)
        _write_records(folder, recipe, report, options, provenance, facts, tokenizer)
        write_files_record(folder, facts)
    seconds = time.perf_counter() - began
    return ExportResult(out, stored, size_of(out), seconds, facts["check"])


def asked_of(pretrained: str, options: ExportOptions) -> dict[str, Any]:
    """Return what a folder that is there has to share to be the one that is asked for."""
    how = [options.format, str(options.max_shard_size), options.keep_calibration]
    return {"base_model": pretrained, "asked": how}


def _quantized_layers(model: nn.Module, report: Report) -> list[QuantizedLayer]:
    lost = [r.name for r in report.layers if r.bits is not None and r.name not in report.grids]
    if lost:
        raise CalibError(
            f"The report no longer holds the levels of {lost[0]} (an evaluation lets them go): "
            "export with export_dir=, or right after compress()."
        )
    inputs = input_quantizers(model)
    rounded = [row.name for row in report.layers if row.name in {*report.grids, *inputs}]
    return [
        QuantizedLayer(
            name,
            model.get_submodule(name).weight.detach(),
            report.grids.get(name),
            inputs.get(name),
        )
        for name in rounded
    ]


def _put_levels(
    state: dict[str, Tensor],
    layers: list[QuantizedLayer],
    tensors: Callable[[QuantizedLayer], dict[str, Tensor]],
) -> None:
    """Put levels in the place of weights."""
    for layer in layers:
        del state[f"{layer.name}.weight"]
        # On the CPU: nothing more is computed with them, and the check needs the memory.
        state |= {f"{layer.name}.{name}": t.cpu() for name, t in tensors(layer).items()}


def _other_linears(model: nn.Module, layers: list[QuantizedLayer]) -> list[str]:
    known = {layer.name for layer in layers}
    found = model.named_modules()
    return [name for name, m in found if isinstance(m, nn.Linear) and name not in known]


def _write_model(
    model: Any,
    config: Any,
    state: dict[str, Tensor],
    settings: dict[str, Any] | None,
    folder: Path,
    options: ExportOptions,
) -> None:
    kept = model.config, getattr(model, "generation_config", None)
    try:
        model.config = config
        if kept[1] is not None:
            # Settings that transformers would not write (a temperature without sampling) came
            # with the base model, and go with it.
            model.generation_config = type(kept[1])()
        model.save_pretrained(
            folder,
            state_dict=state,
            max_shard_size=options.max_shard_size,
            # The names that experts are published under do not find their way back past packed
            # layers: transformers 5.17 fills them with random numbers.
            save_original_format=settings is None or not any(map(is_experts, model.modules())),
        )
    finally:
        model.config = kept[0]
        if kept[1] is not None:
            model.generation_config = kept[1]
    if kept[1] is not None:
        (folder / "generation_config.json").write_text(kept[1].to_json_string(), encoding="utf-8")
    for path in folder.glob("*.safetensors"):
        # These are written for their owner alone.
        path.chmod((folder / "config.json").stat().st_mode)
    if settings is not None:
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["quantization_config"] = settings
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_records(
    folder: Path,
    recipe: Recipe,
    report: Report,
    options: ExportOptions,
    provenance: Provenance,
    facts: dict[str, Any],
    tokenizer: Any,
) -> None:
    def write(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    metadata = recipe.to_metadata()
    write(names.RECIPE, recipe_text(recipe))
    config = {"recipe": metadata, "export_format": options.format}
    write(names.CALIB_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    told = {**report.summary(), "table": report.table(), "command": provenance.command}
    told = publishable(told)  # a published folder tells no local path
    write(names.REPORT, json.dumps(told, indent=1, sort_keys=True) + "\n")
    if report.calibration_set is not None:
        record = calibration_record(report.calibration_set)
        write(names.CALIBRATION, json.dumps(record, indent=1, sort_keys=True) + "\n")
        if options.keep_calibration:
            report.calibration_set.save(folder / names.CALIBRATION_SET, tokenizer=tokenizer)
    write(names.CARD, model_card(report, provenance, facts, provenance.dense_results))
