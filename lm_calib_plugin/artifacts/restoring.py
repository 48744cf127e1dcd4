"""From an artifact back onto a dense model: everything is checked before anything is changed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lm_calib_plugin import engine
from lm_calib_plugin.artifacts.changes import Changes, apply_structure, check_changes
from lm_calib_plugin.artifacts.grids import made_grid
from lm_calib_plugin.artifacts.keeping import GRID, PARAMETER, weights_key
from lm_calib_plugin.artifacts.record import TENSORS, DamagedError, check_tensors, read_record
from lm_calib_plugin.artifacts.tensors import KINDS
from lm_calib_plugin.engine.activations import install
from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.joint import pruning_of, with_part
from lm_calib_plugin.method import Method
from lm_calib_plugin.quantization.grids import Grid
from lm_calib_plugin.quantization.pipeline import Quantizer
from lm_calib_plugin.report import LayerRow
from lm_calib_plugin.work import Done, Job, with_widths

# Dtypes of parameters by their names in a file.
_DTYPES = {kind: str(dtype) for dtype, kind in KINDS.items()}


@dataclass(frozen=True)
class Loaded:
    """An artifact that fits a model: ``limits`` are those of rounded inputs, by layer."""

    record: dict[str, Any]
    done: Done
    changes: Changes
    limits: dict[str, float | None] | None


def load(place: Path, job: Job) -> Loaded:
    """Read an artifact and hold it against the model and the job; nothing is changed.

    Every byte is compared with the digests, every name, shape and dtype with the model.

    Raises
    ------
    DamagedError
        When the artifact is damaged, or does not fit.
    NewerError
        When a newer version wrote it.
    """
    record = read_record(place)
    check_tensors(place, record)
    try:
        done = _done(record["result"], job)
        if weights_key(job, done.method, done.unchanged) != record["key"]:
            raise ValueError("it was made by another recipe")
        changes = Changes(**record["changes"])
        with safe_open(str(place / TENSORS), framework="pt") as file:
            check_changes(job.model, job.blocks, changes, _parameters(file))
            done.grids = _grids(file, record["grids"], job)
        return Loaded(record, done, changes, _limits(record, job))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DamagedError(
            f"{place}: damaged: it does not fit this model ({type(error).__name__}: {error})."
        ) from None


def apply(place: Path, loaded: Loaded, job: Job) -> Done:
    """Bring the dense model to what an artifact holds; return the result that it was kept with.

    Raises
    ------
    CalibError
        When the model does not end with the digest that the artifact was made with; it is changed.
    """
    start = time.perf_counter()
    done, record = loaded.done, loaded.record
    _write(place / TENSORS, loaded.changes, job)
    if loaded.limits is not None:
        spec = job.method.activations
        assert spec is not None
        known = [layer for layer in job.layers if layer.name in loaded.limits]
        fixed = {name: x for name, x in loaded.limits.items() if x is not None}
        install(known, spec, None if spec.dynamic else fixed)
    if job.method.kv_bits is not None:
        engine.quantize_kv(job.model, job.method.kv_bits, job.blocks)
    done.hashes = engine.parameter_hashes(job.model)
    found = engine.weights_digest(job.model, done.hashes)
    if found != record["weights_digest"]:
        raise CalibError(
            f"{place}: the model that was loaded has the digest {found[:12]}, it was kept with "
            f"{record['weights_digest'][:12]}. lm-calib cache rm {place.name[:12]} deletes the "
            "artifact; cache=false does without."
        )
    done.seconds = {"restore": time.perf_counter() - start}
    return done


@torch.no_grad()
def _write(path: Path, changes: Changes, job: Job) -> None:
    """Change structure and values of the live model, one tensor at a time."""
    there = {name for name, _ in job.model.named_parameters()}
    with safe_open(str(path), framework="pt") as file:
        # Parameters of new modules are needed to make these; blocks that went leave their names.
        made = ("." + part for part in ("shift", "down", "up", "bias"))
        endings = tuple(made)
        new: dict[str, Tensor] = {
            name: file.get_tensor(f"{PARAMETER}/{name}")
            for name in changes.changed
            if name.endswith(endings) and (name not in there or name in changes.biases)
        }
        apply_structure(job.model, job.blocks, changes, new)
        live = dict(job.model.named_parameters())
        for name in changes.changed:
            live[name].data.copy_(file.get_tensor(f"{PARAMETER}/{name}"))


def _parameters(file: Any) -> dict[str, tuple[list[int], str]]:
    """Return shape and dtype of every parameter in a file of tensors."""
    found = {}
    for key in file.keys():  # noqa: SIM118 - not a mapping
        kind, _, name = key.partition("/")
        if kind == PARAMETER:
            part = file.get_slice(key)
            found[name] = (list(part.get_shape()), _DTYPES[part.get_dtype()])
        elif kind != GRID:
            raise ValueError(f"a tensor named {key}")
    return found


def _grids(file: Any, plain: Mapping[str, Any], job: Job) -> dict[str, Grid]:
    """Return the grid of every quantized layer, on the device of its weight."""
    devices = {layer.name: layer.device for layer in job.layers}
    parts: dict[str, dict[str, Tensor]] = {}
    for key in file.keys():  # noqa: SIM118 - not a mapping
        kind, _, rest = key.partition("/")
        if kind == GRID:
            name, _, field = rest.rpartition("/")
            parts.setdefault(name, {})[field] = file.get_tensor(key).to(devices[name])
    if parts.keys() != plain.keys():
        raise ValueError("grids without tensors")
    # In the order of the layers, as the work gives them.
    order = [layer.name for layer in job.layers if layer.name in plain]
    return {name: made_grid(plain[name], parts[name]) for name in order}


def _limits(record: Mapping[str, Any], job: Job) -> dict[str, float | None] | None:
    """Return the limits of rounded inputs, checked against what the method rounds."""
    spec, kept = job.method.activations, record["activations"]
    if record["kv_bits"] != job.method.kv_bits:
        raise ValueError("keys and values of another width")
    if kept is None:
        return None
    limits: dict[str, float | None] = kept["limits"]
    if spec is None or kept["spec"] != spec.describe():
        raise ValueError(f"inputs rounded to {kept['spec']}")
    for name, limit in limits.items():
        fixed = isinstance(limit, float) and 0 < limit < float("inf")
        if (limit is not None) == spec.dynamic or (limit is not None and not fixed):
            raise ValueError(f"the limit {limit} of {name}")
    if not limits.keys() <= {layer.name for layer in job.layers}:
        raise ValueError("limits of other layers")
    return limits


def _done(result: Mapping[str, Any], job: Job) -> Done:
    method: Method = job.method
    methods = dict(job.treated)
    if result["widths"]:
        assert isinstance(method, Quantizer)
        methods |= with_widths(method, result["widths"])
    pruning = pruning_of(method)
    if pruning is not None and result["sparsity"] != float(pruning.sparsity):
        method = with_part(method, dataclasses.replace(pruning, sparsity=result["sparsity"]))
    rows = [LayerRow(**{**row, "shape": tuple(row["shape"])}) for row in result["rows"]]
    return Done(
        method,
        result["unchanged"],
        result["achieved"],
        {},
        list(result["warnings"]),
        result["pads"],
        rows=rows,
        transforms=result["transforms"],
        methods=methods,
        structure=result["structure"],
    )
