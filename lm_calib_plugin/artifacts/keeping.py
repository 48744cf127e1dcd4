"""From a compressed model to the two files of an artifact."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lm_calib_plugin import engine, storage
from lm_calib_plugin.accounting import versions
from lm_calib_plugin.artifacts.changes import Dense, find_changes
from lm_calib_plugin.artifacts.grids import plain_grid
from lm_calib_plugin.artifacts.record import TENSORS, write_record
from lm_calib_plugin.artifacts.shelf import check_room, set_aside
from lm_calib_plugin.artifacts.tensors import save_file
from lm_calib_plugin.engine.activations import quantizers
from lm_calib_plugin.engine.kv_cache import kv_bits
from lm_calib_plugin.joint import pruning_of, quantizer_of
from lm_calib_plugin.method import Method
from lm_calib_plugin.work import Done, Job

# Before the names of tensors: parameters of the model, and fields of grids.
PARAMETER, GRID = "parameter", "grid"
RECORD_BYTES = 1 << 20  # of a record, and a few thousand for each layer
ROW_BYTES = 4096


def most_bytes(job: Job) -> int:
    """Return how many bytes the artifact of a job can take at most."""
    model, method = job.model, job.method
    total = sum(_size(p) for p in model.parameters())
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    # A transform may change everything, and give a tied head weights of its own.
    whole = total + (0 if head is None else _size(head))
    layers = {layer.place: layer.parameter for layer in job.layers}
    small = sum(_size(p) for p in job.blocks.modules.parameters() if p.dim() < 2)
    if job.structural:
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        needed = whole + sum(8 * m.out_features for m in linear)
    elif method.transform is not None:
        needed = whole
    else:
        needed = sum(map(_size, layers.values())) + small
    quantizer = quantizer_of(method)
    for layer in job.layers if quantizer is not None else ():
        own = quantizer_of(job.treated.get(layer.name, method))
        size = own.group_size if own is not None else -1
        out, width = layer.shape
        groups = 1 if size == -1 else -(-width // size)
        needed += 2 * 4 * out * groups + ROW_BYTES  # scales and zero points, float32
    return needed + RECORD_BYTES + ROW_BYTES * (len(job.layers) + len(job.blocks))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def keep(
    place: Path, job: Job, dense: Dense, done: Done, key: str, asked: Mapping[str, Any]
) -> int:
    """Write the artifact of a finished job; return its bytes. The lock is held by the caller.

    Raises
    ------
    NotKeptError
        When something became of the model that an artifact has no words for.
    OSError, ValueError
        When it can not be written; nothing is left behind then.
    """
    if done.hashes is None:
        done.hashes = engine.parameter_hashes(job.model)
    changes = find_changes(dense, job.model, job.blocks, done.hashes)
    live = dict(job.model.named_parameters())
    tensors = {f"{PARAMETER}/{name}": live[name].detach() for name in changes.changed}
    grids = {}
    for name, grid in done.grids.items():
        grids[name], parts = plain_grid(grid)
        tensors |= {f"{GRID}/{name}/{field}": value for field, value in parts.items()}
    content = {
        "request": key,
        "asked": asked,
        **_described(job, done),
        "changes": asdict(changes),
        "grids": grids,
        "activations": _inputs(job),
        "kv_bits": kv_bits(job.model),
        "result": _result(job, done),
        "weights_digest": engine.weights_digest(job.model, done.hashes),
    }
    check_room(place.parent, sum(map(_size, tensors.values())) + RECORD_BYTES)
    set_aside(place)
    with storage.new_folder(place) as temporary:
        file = temporary / TENSORS
        save_file(tensors, file)
        content["bytes"] = file.stat().st_size
        content["sha256"] = storage.file_digest(file)
        write_record(temporary, content)
        return sum(path.stat().st_size for path in temporary.iterdir())


def _described(job: Job, done: Done) -> dict[str, Any]:
    """Return what people, and ``lm-calib cache ls``, want to know."""
    resolved, calibration = job.resolved(done.method, done.unchanged), job.calibration
    drawn = None
    if calibration is not None:
        drawn = {
            "sources": [str(source.get("source")) for source in calibration.sources],
            "nsamples": calibration.nsamples,
            "seqlen": calibration.seqlen,
            "calib_id": calibration.calib_id,
        }
    config: Any = getattr(job.model, "config", None)
    return {
        "key": weights_key(job, done.method, done.unchanged),
        "recipe": resolved.to_metadata(),
        "model": job.dense_digest,
        "model_name": str(getattr(config, "_name_or_path", "") or ""),
        "calibration": drawn,
        "created": round(time.time(), 3),
        "seconds": round(sum(done.seconds.values()), 3),
        "versions": versions(),
    }


def weights_key(job: Job, method: Method, unchanged: bool) -> str:
    """Return the recipe key of the simulated model, however it is to run."""
    resolved = job.resolved(method, unchanged)
    plain = job.recipe.model_copy(update={"execution": None})
    return dataclasses.replace(resolved, recipe=plain).key()


def _inputs(job: Job) -> dict[str, Any] | None:
    """Return how inputs of layers are rounded, and to which limits."""
    spec, found = job.method.activations, quantizers(job.model)
    if spec is None or not found:
        return None
    limits = {n: None if q.limit is None else float(q.limit) for n, q in found.items()}
    return {"spec": spec.describe(), "limits": limits}


def _result(job: Job, done: Done) -> dict[str, Any]:
    pruning = pruning_of(done.method)
    widths = {}
    if job.recipe.bits_budget is not None:
        widths = {n: done.grids[n].bits for n in done.methods if n not in job.treated}
    return {
        "unchanged": done.unchanged,
        "achieved": done.achieved,
        "seconds": done.seconds,
        "warnings": done.warnings,
        "pads": done.pads,
        "rows": [asdict(row) for row in done.rows],
        "transforms": done.transforms,
        "structure": done.structure,
        # What was found on the way: the strength of all layers together, widths of single ones.
        "sparsity": None if pruning is None else float(pruning.sparsity),
        "widths": widths,
    }
