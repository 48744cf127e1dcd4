"""One model and one recipe, checked and ready, and the work on its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lm_calib_plugin import engine, storage
from lm_calib_plugin.accounting import coarse_warning, first_tokens, measure
from lm_calib_plugin.allocation import allocate, strength_found
from lm_calib_plugin.bit_allocation import allocate_bits
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.checks import in_force_by_layer, vocab_size
from lm_calib_plugin.engine.batches import Chunk, make_chunks, token_budget
from lm_calib_plugin.engine.ranks import Ranks
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.joint import pruning_of, quantizer_of, with_part
from lm_calib_plugin.method import Method
from lm_calib_plugin.placement import execution_device, execution_devices
from lm_calib_plugin.quantization.pipeline import Quantizer
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import LayerRow
from lm_calib_plugin.resolved import Facts, ResolvedRecipe
from lm_calib_plugin.runtime import Runtime


@dataclass
class Job:
    """A model, a recipe that fits it, and what is known before its weights are changed.

    ``treated`` holds the layers with options of their own, by name; ``left`` the matrices that stay
    dense, with the reason; ``given`` tells whether the calibration set was made before. ``hashes``
    and ``dense_digest`` are those of the model as it came. ``ranks`` are the processes that do the
    job together.
    """

    model: nn.Module
    tokenizer: Any
    recipe: Recipe
    runtime: Runtime
    method: Method
    blocks: engine.Blocks
    layers: Sequence[engine.TargetLayer]
    left: list[tuple[str, str]]
    treated: dict[str, Method]
    seqlen: int
    calibration: CalibrationSet | None = None
    given: bool = False
    hashes: dict[str, list[Any]] = field(default_factory=dict)
    dense_digest: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def structural(self) -> bool:
        """Whether whole parts are taken out of the model."""
        return self.method.scope == "model"

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return execution_device(self.model.get_input_embeddings())  # type: ignore[operator]

    @property
    def held(self) -> list[int]:
        """Numbers of the sequences that are held out."""
        if self.calibration is None:
            return []
        return sorted(engine.heldout_indices(self.calibration.nsamples, self.recipe.heldout))

    @property
    def names(self) -> list[str]:
        """Names of what is worked on."""
        return [self.blocks.path] if self.structural else [layer.name for layer in self.layers]

    @property
    def chunk_size(self) -> int:
        """Number of calibration sequences that a model sees at once; 0 without any."""
        if self.calibration is None:
            return 0
        size = self.runtime.calib_batch_size
        if size == "auto":
            size = token_budget(self.device, max(len(s) for s in self.calibration.sequences))
        return min(int(size), self.calibration.nsamples)

    @property
    def pad_id(self) -> int:
        """What shorter sequences of a chunk are filled up with."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if isinstance(pad, int) and pad < vocab_size(self.model) else 0

    @property
    def inputs(self) -> str | None:
        """Name of what goes through the dense model: equal names, equal bits; None without data.

        The ids themselves count, and where every weight is used.
        """
        calibration = self.calibration
        if calibration is None:
            return None
        ids = hashlib.sha256()
        for sequence in calibration.sequences:
            ids.update(f"{len(sequence)} ".encode() + sequence.cpu().numpy().tobytes())
        devices = {name: str(place) for name, place in execution_devices(self.model).items()}
        return storage.digest(
            {
                "model": self.dense_digest,
                **engine.circumstances(self.model),
                "devices": devices,
                "block_path": self.blocks.path,
                "calib_id": calibration.calib_id,
                "ids": ids.hexdigest(),
                "weights": calibration.weights,
                "heldout": self.held,
                "chunk": self.chunk_size,
                "pad": self.pad_id,
                "exclude_first_token": self.recipe.exclude_first_token,
            }
        )

    def check_ids(self) -> None:
        """Raise a UserError when a token id of the calibration set has no row of embeddings."""
        if self.calibration is None:
            return
        vocabulary = vocab_size(self.model)
        highest = max(int(s.max()) for s in self.calibration.sequences)
        if highest >= vocabulary:
            raise UserError(
                "calibration",
                f"token id {highest} >= {vocabulary} rows of the embeddings",
                fix="wrong tokenizer for this model?",
            )

    def chunks(self) -> list[Chunk]:
        """Return the calibration sequences anew, in chunks, which a pass uses up."""
        calibration = self.calibration
        if calibration is None:
            return []
        return make_chunks(
            calibration.sequences,
            engine.heldout_indices(calibration.nsamples, self.recipe.heldout),
            self.chunk_size,
            self.pad_id,
            weights=calibration.weights,
            skip_first=self.recipe.exclude_first_token,
        )

    def resolved(self, method: Method, unchanged: bool) -> ResolvedRecipe:
        """Return the recipe with nothing left open: ``method`` as it was in force at the end."""
        recipe, calibration = self.recipe, self.calibration
        in_force = in_force_by_layer(self.method, self.treated, recipe)
        sources = calibration.sources if calibration else ()
        packs = sorted({str(s["pack"]) for s in sources if s.get("pack")})
        own: dict[str, Any] = {}
        if recipe.bits_budget is not None:
            own["bits"] = recipe.bits
        named = {"overrides": recipe.overrides} if recipe.overrides else {}
        facts = Facts(
            model=self.dense_digest,
            layers=storage.digest(self.names),
            revision=method.revision,
            options=method.options() | own | named,
            identity=method.identity() | own | ({"overrides": in_force} if in_force else {}),
            # Where a block sees what dense blocks give, there is nothing to correct.
            inert=method.inert + (("correction",) if recipe.propagate == "dense" else ()),
            unchanged=unchanged,
            heldout=len(self.held),
            calib_id=calibration.calib_id if calibration else None,
            seqlen=calibration.seqlen if calibration else None,
            # Packed in several ways: each source is left its own way again.
            pack=packs[0] if len(packs) == 1 else None,
        )
        return recipe.resolve(facts)


@dataclass
class Done:
    """What came out of the work on a model.

    ``method`` is in force where ``methods`` (by name) does not say otherwise, ``hashes`` are those
    of the parameters after the work, where they are known. ``processes`` are the calibration tokens
    of each of several processes that divided the work, ``waited_on_host`` tells whether hidden
    states were in the memory of the host.
    """

    method: Method
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
    hashes: dict[str, list[Any]] | None = None
    processes: list[int] | None = None
    waited_on_host: bool = False


def work_on(job: Job) -> Done:
    """Do what the recipe says, on the live model."""
    return _on_model(job) if job.structural else _on_layers(job)


def _on_layers(job: Job) -> Done:
    """Compress weights one by one."""
    model, blocks, layers, method = job.model, job.blocks, job.layers, job.method
    progress = job.runtime.progress
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
    method, methods = _divided(job)
    if job.ranks.several and job.recipe.bits_budget is not None:
        warnings.append("every process found all widths of bits=auto by itself")
    if methods:
        seconds["allocation"] = time.perf_counter() - start
    plan = engine.Plan(
        method,
        layers,
        job.recipe.propagate,
        methods,
        job.recipe.true_sequential,
        _shared_inputs(job),
    )
    result = engine.run(model, blocks, job.chunks(), plan, job.device, progress, job.ranks)
    start = time.perf_counter()
    strengths = {n: pruning_of(m) for n, m in methods.items()}
    emptied = [n for n, own in strengths.items() if own is not None and float(own.sparsity) == 1]
    if emptied:
        warnings.append(f"{len(emptied)} layers ({emptied[0]}, ...) lost every weight")
    if method.kv_bits is not None:
        engine.quantize_kv(model, method.kv_bits, blocks)
    achieved = measure(model, blocks, layers, method, result.grids) | first_tokens(result.rows)
    seconds["measure"] = time.perf_counter() - start
    return Done(
        method,
        method.does_nothing and not methods,
        achieved,
        seconds | result.seconds,
        warnings + result.warnings,
        result.pads,
        rows=result.rows,
        transforms=transforms + result.transforms,
        grids=result.grids,
        methods=methods,
        processes=result.processes,
        waited_on_host=result.waited_on_host,
    )


def _divided(job: Job) -> tuple[Method, dict[str, Method]]:
    """Return the method, and those of layers treated otherwise, after strength was divided up."""
    model, blocks, layers, method = job.model, job.blocks, job.layers, job.method
    progress = job.runtime.progress
    methods = dict(job.treated)
    if job.recipe.bits_budget is not None:
        assert isinstance(method, Quantizer)
        # Every process finds all widths; those of the first are taken.
        widths = allocate_bits(
            model,
            blocks,
            job.chunks(),
            layers,
            method,
            {name: own for name, own in job.treated.items() if isinstance(own, Quantizer)},
            job.recipe.bits_budget,
            job.device,
            progress,
        )
        methods |= with_widths(method, job.ranks.first("widths", widths))
    pruning = pruning_of(method)
    rule = pruning.allocation if pruning is not None else None
    if rule is not None and not (method.does_nothing and rule.keeps_budget):
        assert pruning is not None
        inputs = _shared_inputs(job)
        found = allocate(
            model, blocks, job.chunks, layers, pruning, job.device, progress, inputs, job.ranks
        )
        pruning = strength_found(pruning, layers, found, job.recipe.sparsity)
        for name, own in found.items():
            methods[name] = with_part(methods.get(name, method), own)
        method = with_part(method, pruning)
    return method, methods


def _shared_inputs(job: Job) -> str | None:
    """Return the name of what goes through the model, where others may see the same."""
    rotated = job.method.transform is not None and job.method.transform.level == "model"
    return job.inputs if engine.shared_here() is not None and not rotated else None


def with_widths(method: Quantizer, widths: dict[str, int]) -> dict[str, Method]:
    """Return the methods of layers that got widths of their own, by name."""
    return {name: dataclasses.replace(method, bits=bits) for name, bits in widths.items()}


def _on_model(job: Job) -> Done:
    """Take whole parts out of a model."""
    result = engine.reshape(
        job.model,
        job.blocks,
        job.chunks(),
        job.method,
        job.device,
        follow=job.recipe.propagate == "compressed",
        progress=job.runtime.progress,
    )
    alone = "every process did the whole work: parts of a model are ranked together"
    return Done(
        job.method,
        job.method.does_nothing or not result.removed,
        result.achieved(),
        result.seconds,
        result.warnings + [alone] * job.ranks.several,
        result.pads,
        structure=result.table(),
    )
