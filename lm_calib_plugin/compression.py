"""The composition root: ``compress(model, tokenizer, recipe) -> Report``.

Check, draw, work (or load what an earlier run made), count, report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_calib_plugin import engine, storage
from lm_calib_plugin.accounting import (
    calibration_summary,
    cuda_devices,
    data_warnings,
    peak_memory,
    versions,
)
from lm_calib_plugin.allocation import check_allocation
from lm_calib_plugin.artifacts.cache import Outcome, check_early, loaded_or_done
from lm_calib_plugin.artifacts.request import asked
from lm_calib_plugin.bank.mixtures import Task, draw
from lm_calib_plugin.bit_allocation import check_budget
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.checks import (
    check_calibration,
    check_heldout,
    check_layers,
    check_offloaded,
    check_tokenizer,
    overridden,
    sequence_length,
    vocab_size,
)
from lm_calib_plugin.engine.ranks import Ranks
from lm_calib_plugin.errors import CalibError, UserError, listed
from lm_calib_plugin.guard import check_agreed, left_as_found, several_processes
from lm_calib_plugin.joint import pruning_of
from lm_calib_plugin.packed import check_packed, pack_layers
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import Report
from lm_calib_plugin.runtime import Runtime
from lm_calib_plugin.work import Done, Job, work_on

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

    In a process group of torch (``torchrun``, ``accelerate launch``, or
    ``torch.distributed.init_process_group``) all processes have to call this with the same
    arguments: they divide the work, and end with the same weights, bit by bit. Those of one process
    may differ in last bits of sums. ``runtime.split=False`` lets each do all of it.

    Parameters
    ----------
    model
        A decoder-only Hugging Face model, in memory, on one or several devices.
    tokenizer
        Its tokenizer; may be None when no data is used or ``calibration`` is given.
    recipe
        What to do.
    runtime
        Chunk size, report folder, progress bar, and whether compressed models are kept.
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
    CalibError
        When another process failed, does something else, or went away.
    """
    runtime = runtime or Runtime()
    ranks = Ranks.here(runtime.split)
    if ranks.rank:
        runtime = dataclasses.replace(runtime, progress=False)
    with ranks.together():
        return _together(model, tokenizer, recipe, runtime, calibration, ranks)


def _together(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    runtime: Runtime,
    calibration: CalibrationSet | None,
    ranks: Ranks,
) -> Report:
    """Compress a model; the processes meet at the same places, or none goes on."""
    job = _checked(model, tokenizer, recipe, runtime, calibration)
    job.ranks = ranks
    check_early(job)
    with left_as_found(model):
        if job.structural:
            engine.check_reshape(model, job.blocks, job.method, job.device)
        with _head_of_its_own(job):
            _identify(job)
            _draw(job)
            _check_same(job)
        for place in cuda_devices(model):
            torch.cuda.reset_peak_memory_stats(place)
        outcome = loaded_or_done(job, work_on)
        digest = engine.weights_digest(model, outcome.done.hashes)
        if recipe.execution == "packed":
            # Every process for itself, behind the lock of the cache: they have to agree.
            _run_packed(job, outcome.done)
    check_agreed(ranks.exchange("digest", digest))
    report = _report(job, outcome, digest)
    if is_main_process():
        folder = job.runtime.report_dir
        report.write(Path(folder) if folder else storage.cache_dir() / "reports")
    return report


def _checked(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    runtime: Runtime,
    calibration: CalibrationSet | None,
) -> Job:
    """Refuse what does not go together, before any data is read or any weight is changed."""
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
    if calibration is None:
        check_calibration(recipe)
    blocks = engine.find_blocks(model, recipe.block_path)
    layers: list[engine.TargetLayer] = []
    left: list[tuple[str, str]] = []
    if method.scope != "model":
        layers, left = engine.select_layers(
            model, blocks, recipe.targets, recipe.ignore, recipe.untie
        )
    treated = overridden(method, layers, recipe)
    check_layers(method, treated, layers)
    check_offloaded(model, recipe, runtime, layers)
    if recipe.bits_budget is not None:
        check_budget(layers, method, treated, recipe.bits_budget)
    engine.check_reach(model, blocks, layers, method)
    if recipe.execution == "packed":
        first = layers[0].parameter
        check_packed(recipe, method, first.device, [first.dtype])
    pruning = pruning_of(method)
    if pruning is not None:
        check_allocation(layers, pruning)
    if tokenizer is None and recipe.terms and calibration is None:
        raise UserError(
            "tokenizer",
            "got None",
            "a tokenizer turns calibration text into ids",
            "give the model's tokenizer, or a calibration set made before",
        )
    if calibration is not None and tokenizer is not None:
        check_tokenizer(calibration, tokenizer)
    return Job(
        model,
        tokenizer,
        recipe,
        runtime,
        method,
        blocks,
        layers,
        left,
        treated,
        seqlen,
        calibration,
        calibration is not None,
    )


@contextlib.contextmanager
def _head_of_its_own(job: Job) -> Iterator[None]:
    """Give a tied head that is a target a weight of its own; not if an error comes inside."""
    tie = engine.untied(job.model, job.layers)
    try:
        yield
    except BaseException:
        tie()
        raise


def _identify(job: Job) -> None:
    """Name the model as it is now."""
    start = time.perf_counter()
    job.hashes = engine.parameter_hashes(job.model)
    job.dense_digest = engine.model_digest(job.model, job.hashes)
    job.seconds["digest"] = time.perf_counter() - start


def _draw(job: Job) -> None:
    """Draw the calibration set, unless it is given or none is used."""
    start = time.perf_counter()
    if job.calibration is None and job.recipe.terms:
        task = Task(
            job.recipe,
            job.model,
            job.tokenizer,
            job.blocks,
            [layer for layer in job.layers if layer.block != engine.HEAD],
            job.method,
            job.seqlen,
            job.dense_digest,
            vocab_size(job.model),
            job.runtime,
        )
        found = draw(task)
        job.calibration = found.calibration
        if found.damp is not None:
            job.method, *others = (
                dataclasses.replace(one, damp=found.damp)  # type: ignore[type-var]
                for one in (job.method, *job.treated.values())
            )
            job.treated = dict(zip(job.treated, others, strict=True))
    job.check_ids()
    if not job.structural:
        check_heldout(job.method, job.recipe, job.calibration)
    job.seconds["calibration"] = time.perf_counter() - start


def _check_same(job: Job) -> None:
    """Refuse to divide work that is not the same on all processes."""
    if not job.ranks.several:
        return
    # Hardware may differ: each layer is solved by one process.
    mine = asked(job) | {"hardware": None, "cache": bool(job.runtime.cache)}
    # Tensors travel in bundles by device: these have to be alike, whatever their numbers are.
    devices = [layer.device for layer in job.layers]
    moves = [one == other for one, other in itertools.pairwise(devices)]
    mine["devices"] = (
        " ".join(sorted({device.type for device in devices})) + f" {storage.digest(moves)[:8]}"
    )
    everyone = job.ranks.exchange("request", mine)
    for name, value in mine.items():
        values = [other.get(name) for other in everyone]
        if any(other != values[0] for other in values):
            shown = [f"{str(other)[:40]} (process {i})" for i, other in enumerate(values)]
            raise CalibError(
                f"{len(everyone)} processes are to compress one model together, but `{name}` "
                f"differs: {listed(shown)}. Give all the same, or split=false where each works "
                f"for itself; {value!s:.40} is that of this process."
            )


def _run_packed(job: Job, done: Done) -> None:
    """Replace layers by kernels, once everything has been counted, and put it in the report."""
    start = time.perf_counter()
    model = job.model
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(vocab_size(model), (1, PROBE), generator=generator).to(job.device)
    before = model(probe, use_cache=False).logits.float()
    found = pack_layers(
        model,
        job.layers,
        job.recipe,
        done.method,
        done.methods,
        done.grids,
        job.runtime.eval_tokens,
        job.ranks,
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


def _report(job: Job, outcome: Outcome, digest: str) -> Report:
    done, calibration = outcome.done, job.calibration
    resolved = job.resolved(done.method, done.unchanged)
    return Report(
        key=resolved.key(),
        recipe=resolved.to_metadata() | _counted(calibration, job.given),
        calibration=calibration_summary(calibration, done.pads, len(job.held)),
        layers=done.rows,
        structure=done.structure,
        transforms=done.transforms,
        execution=done.execution,
        achieved=done.achieved,
        left_dense=job.left,
        seconds=job.seconds | done.seconds,
        peak_memory_gib=peak_memory(job.model),
        warnings=done.warnings
        + data_warnings(job.recipe, calibration, job.left)
        + outcome.warnings,
        versions=versions(),
        weights_digest=digest,
        model_digest=job.dense_digest,
        residence=_residence(job.model, done),
        cache=outcome.cache,
        processes={"count": job.ranks.count, "tokens": done.processes}
        if job.ranks.several
        else None,
        calibration_set=calibration,
        grids=done.grids,
    )


def _residence(model: nn.Module, done: Done) -> dict[str, Any] | None:
    """Return where weights are and hidden states were; None for what everybody expects."""
    found: dict[str, Any] = {}
    if engine.is_offloaded(model):
        found["weights"] = engine.whereabouts(model)
    if done.waited_on_host:
        found["hidden_states"] = "host"
    return found or None


def is_main_process() -> bool:
    """Tell whether this process speaks for all: the only one, or rank 0."""
    return not several_processes() or torch.distributed.get_rank() == 0


def _counted(calibration: CalibrationSet | None, given: bool) -> dict[str, Any]:
    if calibration is None:
        return {}
    return {"nsamples": calibration.nsamples} | ({"calibration": "given"} if given else {})
