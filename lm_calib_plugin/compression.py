"""The composition root: ``compress(model, tokenizer, recipe) -> Report``.

The only module that knows calibration, methods and engine at once.
"""

from __future__ import annotations

import dataclasses
import platform
import resource
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_calib_plugin import engine, storage
from lm_calib_plugin.allocation import allocate, strength_found
from lm_calib_plugin.bank.mixtures import Task, check_mixture, draw
from lm_calib_plugin.calibration import (
    CalibrationSet,
    stored_sets,
    tokenizer_digest,
    validate_calibration,
)
from lm_calib_plugin.engine.batches import Chunk, make_chunks, token_budget
from lm_calib_plugin.errors import NumericalError, UserError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.method import Method
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import Report
from lm_calib_plugin.resolved import Facts, ResolvedRecipe
from lm_calib_plugin.runtime import Runtime

DEFAULT_SEQLEN = 2048
PACKAGES = ("lm-calib-plugin", "torch", "transformers", "lm-eval", "datasets", "accelerate")


def compress(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    runtime: Runtime | None = None,
    calibration: CalibrationSet | None = None,
) -> Report:
    """Prune or quantize a causal language model in place, as a recipe says.

    Parameters
    ----------
    model
        A decoder-only Hugging Face model, in memory, on one or several devices.
    tokenizer
        Its tokenizer; may be None when no data is used or ``calibration`` is given.
    recipe
        What to do.
    runtime
        Chunk size, report folder, progress bar.
    calibration
        A calibration set made before; used instead of the recipe's source, and recorded as
        ``calibration: given`` with its own ``calib_id`` and sources.

    Returns
    -------
    Report
        Also written, layer by layer, to ``runtime.report_dir``.

    Raises
    ------
    UserError
        When the recipe does not fit the model, before any data is read or any weight is changed.
    NumericalError
        For NaN, Inf or a matrix that can not be factored; the layer and the stage are named.
    """
    runtime = runtime or Runtime()
    engine.check_supported(model)
    method = recipe.make_method()
    seqlen = sequence_length(recipe, model.config)
    given = calibration is not None
    if not given:
        check_calibration(recipe)
    blocks = engine.find_blocks(model, recipe.block_path)
    structural = method.scope == "model"
    layers, left = [], []
    if not structural:
        layers, left = engine.select_layers(
            model, blocks, recipe.targets, recipe.ignore, recipe.untie
        )
    for layer in layers:
        method.check_layer(layer.name, layer.shape)
        if method.needs_bias and layer.bias is None:
            raise UserError(
                "update",
                f"{layer.name} has no bias to correct",
                "models whose layers have biases (OPT, GPT-2, Phi)",
                f"leave it out (ignore={layer.name.rsplit('.', 1)[-1]}), or use another update",
            )
    if tokenizer is None and recipe.terms and not given:
        raise UserError(
            "tokenizer",
            "got None",
            "a tokenizer turns calibration text into ids",
            "give the model's tokenizer, or a calibration set made before",
        )
    if calibration is not None and tokenizer is not None:
        _check_tokenizer(calibration, tokenizer)
    layers = engine.untied(model, layers)
    seconds: dict[str, float] = {}
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    with left_as_found(model):
        if structural:
            engine.check_reshape(model, blocks, method, device)
        start = time.perf_counter()
        dense_digest = engine.model_digest(model)
        seconds["digest"] = time.perf_counter() - start
        start = time.perf_counter()
        if calibration is None and recipe.terms:
            task = Task(
                recipe,
                model,
                tokenizer,
                blocks,
                [layer for layer in layers if layer.block != engine.HEAD],
                method,
                seqlen,
                dense_digest,
                _vocab_size(model),
                runtime,
            )
            found = draw(task)
            calibration = found.calibration
            if found.damp is not None:
                method = dataclasses.replace(method, damp=found.damp)  # type: ignore[type-var]
        seconds["calibration"] = time.perf_counter() - start
        chunks = _chunks(calibration, recipe, runtime, model, tokenizer, device)
        for place in _cuda_devices(model):
            torch.cuda.reset_peak_memory_stats(place)
        result: Any
        if structural:
            follow = recipe.propagate == "compressed"
            result = engine.reshape(
                model, blocks, chunks, method, device, follow=follow, progress=runtime.progress
            )
        else:
            methods: dict[str, Any] = {}
            if getattr(method, "allocation", None) is not None and not method.does_nothing:
                start = time.perf_counter()
                # A pass uses chunks up, so each has its own.
                methods = allocate(
                    model,
                    blocks,
                    lambda: _chunks(calibration, recipe, runtime, model, tokenizer, device),
                    layers,
                    method,
                    device,
                    runtime.progress,
                )
                method = strength_found(method, layers, methods, recipe.sparsity)
                seconds["allocation"] = time.perf_counter() - start
            plan = engine.Plan(method, layers, recipe.propagate, methods)
            result = engine.run(model, blocks, chunks, plan, device, runtime.progress)
        seconds |= result.seconds
        start = time.perf_counter()
        achieved = (
            result.achieved()
            if structural
            else measure(model, blocks, layers, method, result.grids)
        )
        final_digest = engine.weights_digest(model)
        seconds["measure"] = time.perf_counter() - start
    held = sum(chunk.rows for chunk in chunks if chunk.heldout)
    names = [blocks.path] if structural else [layer.name for layer in layers]
    unchanged = method.does_nothing or (structural and not result.removed)
    resolved = _resolve(recipe, method, dense_digest, names, unchanged, calibration, held)
    report = Report(
        key=resolved.key(),
        recipe=resolved.to_metadata() | _counted(calibration, given),
        calibration=_calibration_summary(calibration, result.pads, held),
        layers=[] if structural else result.rows,
        structure=result.table() if structural else None,
        achieved=achieved,
        left_dense=left,
        seconds=seconds,
        peak_memory_gib=_peak_memory(model),
        warnings=result.warnings + _data_warnings(recipe, calibration, left),
        versions=_versions(),
        weights_digest=final_digest,
        model_digest=dense_digest,
        calibration_set=calibration,
    )
    if is_main_process():
        folder = runtime.report_dir
        report.write(Path(folder) if folder else storage.cache_dir() / "reports")
    return report


def check_calibration(recipe: Recipe) -> None:
    """Check the calibration of a recipe, mixtures too, without network, data or model.

    Raises
    ------
    UserError
        For an option, file, folder, task or number of sources that cannot be used.
    """
    validate_calibration(recipe)
    check_mixture(recipe)


def is_main_process() -> bool:
    """Tell whether this process speaks for all: the only one, or rank 0."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def measure(
    model: nn.Module,
    blocks: engine.Blocks,
    layers: Sequence[engine.TargetLayer],
    method: Method,
    grids: dict[str, Any],
) -> dict[str, Any]:
    """Count zeros, and check that quantized weights lie on their grid, on the live model.

    Returns
    -------
    dict
        ``sparsity`` of the targeted layers, ``sparsity_blocks`` of all parameters of the blocks,
        ``sparsity_model`` of all parameters, ``bits`` (mean width of a targeted weight, without
        scales; None when nothing was quantized).

    Raises
    ------
    NumericalError
        When a weight is not on the grid it was rounded to.
    """
    for layer in layers:
        grid = grids.get(layer.name)
        if grid is not None and not grid.holds(layer.weight):
            raise NumericalError(layer.name, "final count", "weights are not on their grid")
    target = [(int((x.stored == 0).sum()), x.stored.numel()) for x in layers]
    inside = [(int((p == 0).sum()), p.numel()) for p in blocks.modules.parameters()]
    everything = [(int((p == 0).sum()), p.numel()) for p in model.parameters()]
    bits = None
    if grids:
        sizes = {x.name: x.stored.numel() for x in layers}
        bits = sum(grids[n].bits * sizes[n] for n in grids) / sum(sizes[n] for n in grids)
    elif method.kind == "quantization":
        bits = 16.0
    return {
        "sparsity": _share(target),
        "sparsity_blocks": _share(inside),
        "sparsity_model": _share(everything),
        "bits": bits,
    }


def _share(counts: Sequence[tuple[int, int]]) -> float:
    return sum(zeros for zeros, _ in counts) / max(1, sum(size for _, size in counts))


def sequence_length(recipe: Recipe, config: Any) -> int:
    """Return the most tokens of a calibration sequence.

    As asked, else that of ``set:DIR``, else 2048; without being asked never beyond what the model
    accepts.

    Raises
    ------
    UserError
        When more is asked, or stored in a set, than the model has positions for, or less is
        asked than a set holds.
    """
    limit = getattr(engine.text_config(config), "max_position_embeddings", None)
    sets = stored_sets(recipe)
    for stored in sets:
        if recipe.seqlen is not None:
            stored.check_length(recipe.seqlen, "seqlen")
        elif limit:
            stored.check_length(limit, "what the model accepts")
    if recipe.seqlen is None:
        wanted = max((s.stored.seqlen for s in sets), default=DEFAULT_SEQLEN)
        return min(wanted, limit or wanted)
    if limit and recipe.seqlen > limit:
        raise UserError(
            "seqlen",
            f"got {recipe.seqlen}",
            f"the model accepts {limit} positions",
            f"use seqlen<={limit}",
        )
    return recipe.seqlen


def _check_tokenizer(calibration: CalibrationSet, tokenizer: Any) -> None:
    mine = tokenizer_digest(tokenizer)
    if calibration.tokenizer and calibration.tokenizer != mine:
        raise UserError(
            "calibration",
            f"the set was made with tokenizer {calibration.tokenizer}, this model has {mine}",
            "token ids mean something else to another tokenizer",
            "build it again with this model's tokenizer",
        )


def _vocab_size(model: nn.Module) -> int:
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def _chunks(
    calibration: CalibrationSet | None,
    recipe: Recipe,
    runtime: Runtime,
    model: nn.Module,
    tokenizer: Any,
    device: torch.device,
) -> list[Chunk]:
    if calibration is None:
        return []
    highest = max(int(s.max()) for s in calibration.sequences)
    if highest >= _vocab_size(model):
        raise UserError(
            "calibration",
            f"token id {highest} >= {_vocab_size(model)} rows of the embeddings",
            fix="wrong tokenizer for this model?",
        )
    size = runtime.calib_batch_size
    if size == "auto":
        size = token_budget(device, max(len(s) for s in calibration.sequences))
    pad = getattr(tokenizer, "pad_token_id", None)
    pad_id = pad if isinstance(pad, int) and pad < _vocab_size(model) else 0
    held = engine.heldout_indices(len(calibration.sequences), recipe.heldout)
    return make_chunks(
        calibration.sequences,
        held,
        int(size),
        pad_id,
        weights=calibration.weights,
        skip_first=recipe.exclude_first_token,
    )


def _resolve(
    recipe: Recipe,
    method: Method,
    dense_digest: str,
    layers: Sequence[str],
    unchanged: bool,
    calibration: CalibrationSet | None,
    held: int,
) -> ResolvedRecipe:
    sources = calibration.sources if calibration else ()
    packs = sorted({str(s["pack"]) for s in sources if s.get("pack")})
    facts = Facts(
        model=dense_digest,
        layers=storage.digest(list(layers)),
        revision=method.revision,
        options=method.options(),
        inert=method.inert,
        unchanged=unchanged,
        heldout=held,
        calib_id=calibration.calib_id if calibration else None,
        seqlen=calibration.seqlen if calibration else None,
        # Packed in several ways: each source is left its own way again.
        pack=packs[0] if len(packs) == 1 else None,
    )
    return recipe.resolve(facts)


def _calibration_summary(
    calibration: CalibrationSet | None, pads: int, held: int
) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {
        **calibration.summary(),
        "heldout_sequences": held,
        "pad_tokens_excluded": pads,
    }


def _data_warnings(
    recipe: Recipe, calibration: CalibrationSet | None, left: Sequence[tuple[str, str]]
) -> list[str]:
    sources = calibration.sources if calibration else ()
    notes = [f"{s['source']}: {note}" for s in sources for note in s.get("warnings", ())]
    if (
        calibration is not None
        and recipe.heldout
        and not engine.heldout_indices(len(calibration.sequences), recipe.heldout)
    ):
        notes.append(
            f"nothing held out: {recipe.heldout:g} of {len(calibration.sequences)} sequences is "
            "less than one, so no held-out error"
        )
    reasons: dict[str, int] = {}
    for _, why in left:
        if why in engine.CHOSEN:
            continue
        reasons[why] = reasons.get(why, 0) + 1
    notes += [f"{count} matrices left dense: {why}" for why, count in reasons.items()]
    return notes


def _counted(calibration: CalibrationSet | None, given: bool) -> dict[str, Any]:
    if calibration is None:
        return {}
    return {"nsamples": calibration.nsamples} | ({"calibration": "given"} if given else {})


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def _peak_memory(model: nn.Module) -> float:
    """Return the peak in GiB: summed over the model's CUDA devices during the work, or without
    any, of this process since it started."""
    devices = _cuda_devices(model)
    if devices:
        return round(sum(torch.cuda.max_memory_allocated(d) for d in devices) / 2**30, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
