"""The composition root: ``compress(model, tokenizer, recipe) -> Report``.

The only module that knows calibration, methods and engine at once.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_calib_plugin import engine, storage
from lm_calib_plugin.accounting import (
    calibration_summary,
    coarse_warning,
    cuda_devices,
    data_warnings,
    first_tokens,
    measure,
    peak_memory,
    versions,
)
from lm_calib_plugin.allocation import allocate, check_allocation, strength_found
from lm_calib_plugin.bank.mixtures import Task, draw
from lm_calib_plugin.bit_allocation import allocate_bits, check_budget
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.checks import (
    check_calibration,
    check_heldout,
    check_layers,
    check_tokenizer,
    in_force_by_layer,
    overridden,
    sequence_length,
    vocab_size,
)
from lm_calib_plugin.engine.batches import Chunk, make_chunks, token_budget
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.guard import left_as_found, several_processes
from lm_calib_plugin.joint import pruning_of, quantizer_of, with_part
from lm_calib_plugin.method import Method
from lm_calib_plugin.packed import check_packed, pack_layers
from lm_calib_plugin.quantization.pipeline import Quantizer
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import LayerRow, Report
from lm_calib_plugin.resolved import Facts, ResolvedRecipe
from lm_calib_plugin.runtime import Runtime

# Random tokens on which packed and simulated logits are compared.
PROBE = 64


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
    if recipe.true_sequential and method.block_rounding is not None:
        raise UserError(
            "true_sequential",
            f"given with `{recipe.method}`, which rounds all layers of a block together",
            "roundings of single layers, such as rtn and gptq",
            "drop `true_sequential`",
        )
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
    treated = overridden(method, layers, recipe)
    check_layers(method, treated, layers)
    if recipe.bits_budget is not None:
        check_budget(layers, method, treated, recipe.bits_budget)
    engine.check_reach(model, blocks, layers, method)
    if recipe.execution == "packed":
        first = layers[0].parameter
        check_packed(recipe, method, first.device, [first.dtype])
    pruning = pruning_of(method)
    if pruning is not None:
        check_allocation(layers, pruning)
    if tokenizer is None and recipe.terms and not given:
        raise UserError(
            "tokenizer",
            "got None",
            "a tokenizer turns calibration text into ids",
            "give the model's tokenizer, or a calibration set made before",
        )
    if calibration is not None and tokenizer is not None:
        check_tokenizer(calibration, tokenizer)
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
                vocab_size(model),
                runtime,
            )
            found = draw(task)
            calibration = found.calibration
            if found.damp is not None:
                method, *others = (
                    dataclasses.replace(one, damp=found.damp)  # type: ignore[type-var]
                    for one in (method, *treated.values())
                )
                treated = dict(zip(treated, others, strict=True))
        seconds["calibration"] = time.perf_counter() - start
        for place in cuda_devices(model):
            torch.cuda.reset_peak_memory_stats(place)
        fresh = functools.partial(_chunks, calibration, recipe, runtime, model, tokenizer, device)
        if structural:
            done = _on_model(model, blocks, method, recipe, runtime, fresh())
        else:
            check_heldout(method, recipe, calibration)
            done = _on_layers(model, blocks, layers, method, treated, recipe, runtime, fresh)
        final_digest = engine.weights_digest(model)
        if recipe.execution == "packed":
            _run_packed(model, layers, recipe, runtime, done)
    held = len(engine.heldout_indices(calibration.nsamples, recipe.heldout)) if calibration else 0
    in_force = in_force_by_layer(method, treated, recipe)
    resolved = _resolve(recipe, done, in_force, dense_digest, calibration, held)
    report = Report(
        key=resolved.key(),
        recipe=resolved.to_metadata() | _counted(calibration, given),
        calibration=calibration_summary(calibration, done.pads, held),
        layers=done.rows,
        structure=done.structure,
        transforms=done.transforms,
        execution=done.execution,
        achieved=done.achieved,
        left_dense=left,
        seconds=seconds | done.seconds,
        peak_memory_gib=peak_memory(model),
        warnings=done.warnings + data_warnings(recipe, calibration, left),
        versions=versions(),
        weights_digest=final_digest,
        model_digest=dense_digest,
        calibration_set=calibration,
        grids=done.grids,
    )
    if is_main_process():
        folder = runtime.report_dir
        report.write(Path(folder) if folder else storage.cache_dir() / "reports")
    return report


@dataclass
class _Done:
    """What came out of the work on a model; ``names`` are those of what was worked on."""

    method: Method
    names: list[str]
    unchanged: bool
    achieved: dict[str, Any]
    seconds: dict[str, float]
    warnings: list[str]
    pads: int
    rows: list[LayerRow] = field(default_factory=list)
    transforms: list[dict[str, Any]] = field(default_factory=list)
    grids: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    execution: dict[str, Any] | None = None
    structure: dict[str, Any] | None = None


def _on_layers(
    model: nn.Module,
    blocks: engine.Blocks,
    layers: Sequence[engine.TargetLayer],
    method: Method,
    treated: dict[str, Method],
    recipe: Recipe,
    runtime: Runtime,
    fresh: Callable[[], list[Chunk]],
) -> _Done:
    """Compress weights one by one; ``fresh`` makes the chunks, which a pass uses up.

    ``treated`` holds the layers with options of their own, by name.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    seconds: dict[str, float] = {}
    warnings: list[str] = []
    transforms: list[dict[str, Any]] = []
    quantizer = quantizer_of(method)
    if quantizer is not None and not quantizer.keeps_weights:
        warnings += coarse_warning(layers, quantizer.bits)
    if method.transform is not None and method.transform.level == "model":
        start = time.perf_counter()
        transforms.append(engine.rotate(model, blocks, **method.transform.options()))
        seconds["transform"] = time.perf_counter() - start
    start = time.perf_counter()
    methods = dict(treated)
    if recipe.bits_budget is not None:
        assert isinstance(method, Quantizer)
        widths = allocate_bits(
            model,
            blocks,
            fresh(),
            layers,
            method,
            {name: own for name, own in treated.items() if isinstance(own, Quantizer)},
            recipe.bits_budget,
            device,
            runtime.progress,
        )
        methods |= {n: dataclasses.replace(method, bits=b) for n, b in widths.items()}
    pruning = pruning_of(method)
    rule = pruning.allocation if pruning is not None else None
    if rule is not None and not (method.does_nothing and rule.keeps_budget):
        assert pruning is not None
        found = allocate(model, blocks, fresh, layers, pruning, device, runtime.progress)
        pruning = strength_found(pruning, layers, found, recipe.sparsity)
        for name, own in found.items():
            methods[name] = with_part(methods.get(name, method), own)
        method = with_part(method, pruning)
    if methods:
        seconds["allocation"] = time.perf_counter() - start
    plan = engine.Plan(method, layers, recipe.propagate, methods, recipe.true_sequential)
    result = engine.run(model, blocks, fresh(), plan, device, runtime.progress)
    start = time.perf_counter()
    strengths = {n: pruning_of(m) for n, m in methods.items()}
    emptied = [n for n, own in strengths.items() if own is not None and float(own.sparsity) == 1]
    if emptied:
        warnings.append(f"{len(emptied)} layers ({emptied[0]}, ...) lost every weight")
    if method.kv_bits is not None:
        engine.quantize_kv(model, method.kv_bits, blocks)
    achieved = measure(model, blocks, layers, method, result.grids) | first_tokens(result.rows)
    seconds["measure"] = time.perf_counter() - start
    return _Done(
        method,
        [layer.name for layer in layers],
        method.does_nothing and not methods,
        achieved,
        seconds | result.seconds,
        warnings + result.warnings,
        result.pads,
        rows=result.rows,
        transforms=transforms + result.transforms,
        grids=result.grids,
        methods=methods,
    )


def _run_packed(
    model: nn.Module,
    layers: Sequence[engine.TargetLayer],
    recipe: Recipe,
    runtime: Runtime,
    done: _Done,
) -> None:
    """Replace layers by kernels, once everything has been counted, and put it in the report."""
    start = time.perf_counter()
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(vocab_size(model), (1, PROBE), generator=generator).to(device)
    before = model(probe, use_cache=False).logits.float()
    found = pack_layers(
        model, layers, recipe, done.method, done.methods, done.grids, runtime.eval_tokens
    )
    gap = model(probe, use_cache=False).logits.float() - before
    done.seconds["packing"] = time.perf_counter() - start
    done.execution = found.summary()
    done.execution["logits_difference"] = float(gap.norm() / before.norm())
    # The warnings stand with those of the report.
    done.warnings += done.execution.pop("warnings")
    table = found.table()
    for row in done.rows:
        row.execution = table.get(row.name)


def _on_model(
    model: nn.Module,
    blocks: engine.Blocks,
    method: Any,
    recipe: Recipe,
    runtime: Runtime,
    chunks: list[Chunk],
) -> _Done:
    """Take whole parts out of a model."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    follow = recipe.propagate == "compressed"
    result = engine.reshape(
        model, blocks, chunks, method, device, follow=follow, progress=runtime.progress
    )
    return _Done(
        method,
        [blocks.path],
        method.does_nothing or not result.removed,
        result.achieved(),
        result.seconds,
        result.warnings,
        result.pads,
        structure=result.table(),
    )


def is_main_process() -> bool:
    """Tell whether this process speaks for all: the only one, or rank 0."""
    return not several_processes() or torch.distributed.get_rank() == 0


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
    if highest >= vocab_size(model):
        raise UserError(
            "calibration",
            f"token id {highest} >= {vocab_size(model)} rows of the embeddings",
            fix="wrong tokenizer for this model?",
        )
    size = runtime.calib_batch_size
    if size == "auto":
        size = token_budget(device, max(len(s) for s in calibration.sequences))
    pad = getattr(tokenizer, "pad_token_id", None)
    pad_id = pad if isinstance(pad, int) and pad < vocab_size(model) else 0
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
    done: _Done,
    in_force: dict[str, Any],
    dense_digest: str,
    calibration: CalibrationSet | None,
    held: int,
) -> ResolvedRecipe:
    sources = calibration.sources if calibration else ()
    packs = sorted({str(s["pack"]) for s in sources if s.get("pack")})
    own: dict[str, Any] = {}
    if recipe.bits_budget is not None:
        own["bits"] = recipe.bits
    named = {"overrides": recipe.overrides} if recipe.overrides else {}
    facts = Facts(
        model=dense_digest,
        layers=storage.digest(done.names),
        revision=done.method.revision,
        options=done.method.options() | own | named,
        identity=done.method.identity() | own | ({"overrides": in_force} if in_force else {}),
        # Where a block sees what dense blocks give, there is nothing to correct.
        inert=done.method.inert + (("correction",) if recipe.propagate == "dense" else ()),
        unchanged=done.unchanged,
        heldout=held,
        calib_id=calibration.calib_id if calibration else None,
        seqlen=calibration.seqlen if calibration else None,
        # Packed in several ways: each source is left its own way again.
        pack=packs[0] if len(packs) == 1 else None,
    )
    return recipe.resolve(facts)


def _counted(calibration: CalibrationSet | None, given: bool) -> dict[str, Any]:
    if calibration is None:
        return {}
    return {"nsamples": calibration.nsamples} | ({"calibration": "given"} if given else {})
