"""Write a compressed model as an ordinary Hugging Face folder, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from lm_calib_plugin import engine, storage
from lm_calib_plugin.engine.activations import quantizers
from lm_calib_plugin.engine.layers import is_experts
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.execution import PackedLinear
from lm_calib_plugin.export import options as names
from lm_calib_plugin.export.architecture import described, plain_config
from lm_calib_plugin.export.card import model_card
from lm_calib_plugin.export.check import compare_with_folder
from lm_calib_plugin.export.formats import PACKED, check_export, check_model
from lm_calib_plugin.export.older import for_older_readers
from lm_calib_plugin.export.options import ExportOptions, Provenance
from lm_calib_plugin.export.published import publishable
from lm_calib_plugin.export.quantized import QuantizedLayer, layer_tensors, quantization_config
from lm_calib_plugin.export.records import (
    calibration_record,
    read_files_record,
    verify_folder,
    write_files_record,
)
from lm_calib_plugin.guard import random_state_untouched
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
            parts.append(
                f"loaded back: {self.check['tensors']} tensors equal, logits differ by "
                f"{self.check['logits_difference']:.3g}"
            )
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


def check_out(out: Path, recipe: Recipe, overwrite: bool = False, name: str = "out") -> None:
    """Refuse a folder that can not be written, before anything is loaded.

    What was exported by the same recipe may stay: it is not written again if it turns out to be
    the same model.

    Raises
    ------
    UserError
        When something else is there already (with ``overwrite``: something other than an exported
        folder), when a part of the path is a file, or when writing is not allowed; ``name`` is the
        argument.
    """
    if out.exists() or out.is_symlink():
        if not overwrite and not _same_recipe(out, recipe):
            raise _exists(name, out)
        if out.is_symlink() or not _only_an_export(out):
            raise UserError(
                name,
                f"{out} is not a folder that was exported here, or holds other files, too",
                "--overwrite replaces nothing else",
                "name another folder",
            )
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir():
        raise UserError(name, f"{parent} is a file", "name a folder")
    try:
        Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent)).rmdir()
    except OSError as error:
        raise UserError(
            name,
            f"{parent} can not be written ({error.strerror})",
            "a folder that you may write to",
            "name another one",
        ) from None


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
    check_out(out, recipe, options.overwrite)
    running = any(isinstance(module, PackedLinear) for module in model.modules())
    # Layers that run on kernels were looked at before these took their place.
    stored = (
        check_export(recipe, options.format)
        if running
        else check_model(model, recipe, options.format)
    )
    if engine.weights_digest(model) != report.weights_digest:
        raise CalibError(
            "The weights have changed since they were compressed: the report does not describe "
            "the model that would be exported."
        )
    if out.exists() and not options.overwrite:
        return _there(out, report, began)
    config, added = plain_config(model)
    layers = _quantized_layers(model, report) if stored == PACKED else []
    state = _state(model, layers) | added
    settings = quantization_config(layers, _other_linears(model, layers)) if layers else None
    described(model, config, added)
    size = sum(t.numel() * t.element_size() for t in state.values())
    storage.require_space(out.absolute().parent, size + OTHER_FILES, out.name)
    with _told(out), storage.new_folder(out) as folder:
        _sweep(out, folder)
        _write_model(model, config, state, settings, folder, options)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for_older_readers(folder)
        found = None
        if options.check:
            found = compare_with_folder(model, layers, folder, provenance.trust_remote_code)
        facts = {
            "key": report.key,
            "format": stored,
            "model_digest": report.model_digest,
            "weights_digest": report.weights_digest,
            "base_model": publishable(provenance.pretrained),
            "check": found,
        }
        _write_records(folder, recipe, report, options, provenance, facts, tokenizer)
        write_files_record(folder, facts)
        if out.exists():
            _set_aside(out)
    return ExportResult(out, stored, _size(out), time.perf_counter() - began, found)


def _there(out: Path, report: Report, began: float) -> ExportResult:
    """Return what is there, if it is whole and this very model."""
    facts = verify_folder(out).facts
    if any(facts.get(name) != getattr(report, name) for name in ("key", "weights_digest")):
        raise _exists("out", out)
    seconds = time.perf_counter() - began
    return ExportResult(out, facts["format"], _size(out), seconds, facts["check"], True)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _only_an_export(out: Path) -> bool:
    """Tell whether a folder holds an exported model, be it damaged, and nothing else."""
    try:
        known = {names.FILES, *read_files_record(out).files}
    except CalibError:
        return False
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir()}
    return found <= known


def _same_recipe(out: Path, recipe: Recipe) -> bool:
    file = out / names.RECIPE
    return file.is_file() and file.read_text(encoding="utf-8", errors="replace") == _text(recipe)


def _text(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.to_metadata(), sort_keys=False, allow_unicode=True)


def _exists(name: str, out: Path) -> UserError:
    return UserError(name, f"{out} exists", "a new folder", "name another one, or give --overwrite")


def _quantized_layers(model: nn.Module, report: Report) -> list[QuantizedLayer]:
    inputs = quantizers(model)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            for replaced in module.replaced:
                inputs |= quantizers(replaced, name)
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


def _state(model: nn.Module, layers: list[QuantizedLayer]) -> dict[str, Tensor]:
    """Return what is stored, by name: the state of the model, levels instead of weights."""
    state = dict(model.state_dict())
    for layer in layers:
        del state[f"{layer.name}.weight"]
        state |= {f"{layer.name}.{name}": t for name, t in layer_tensors(layer).items()}
    return state


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
    write(names.RECIPE, _text(recipe))
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


@contextlib.contextmanager
def _told(out: Path) -> Iterator[None]:
    """Say in a sentence what keeps a folder from being written; nothing global is touched."""
    try:
        with random_state_untouched(), torch.inference_mode():
            yield
    except (OSError, SafetensorError) as error:
        code = _errno(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full; nothing was kept. Free some space"
        elif code in (errno.ENOTEMPTY, errno.EEXIST):
            what = "something else was put there meanwhile; nothing was kept"
        elif code in (errno.EROFS, errno.EACCES, errno.EPERM):
            what = f"can not be written ({os.strerror(code)})"
        else:
            raise
        raise CalibError(f"{out}: {what}.") from None


def _errno(error: Exception) -> int | None:
    """Return the number of an error of the system; safetensors has it in its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _sweep(out: Path, own: Path) -> None:
    """Delete what killed exports to the same folder left long ago."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        newest = max((p.lstat().st_mtime for p in (path, *path.rglob("*"))), default=0)
        if path != own and path.is_dir() and time.time() - newest > storage.ABANDONED:
            shutil.rmtree(path, ignore_errors=True)


def _set_aside(out: Path) -> None:
    """Take the old folder away, a moment before the new one gets its name."""
    old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    out.replace(old)
    shutil.rmtree(old, ignore_errors=True)
