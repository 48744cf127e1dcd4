"""Take whole parts out of a model, as a structural method decides, and say what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.passes import BlockPass
from lm_calib_plugin.engine.recovery import RecoveryPass
from lm_calib_plugin.engine.rows import rows
from lm_calib_plugin.engine.structure import check_separable, parameters
from lm_calib_plugin.engine.width import UnitGroup, add_bias, channel_variances, find_units
from lm_calib_plugin.errors import CalibError, NumericalError, UnsupportedModelError, UserError
from lm_calib_plugin.statistics import TokenSample

ERROR_TOKENS = 4096
PROBE_TOKENS = 8


@dataclass
class ReshapeResult:
    """What was taken out, and what it did.

    ``ranking`` has one entry a part with its value, ``removed`` the names of those that went,
    ``parameters`` the counts before and after of the blocks and of the model. ``error`` is the
    relative squared error of what the output head receives, ``||h' - h||^2 / ||h||^2``, on up to
    4,096 tokens of the sequences used and of those held out.
    """

    removed: list[str] = field(default_factory=list)
    ranking: list[dict[str, Any]] = field(default_factory=list)
    parameters: dict[str, list[int]] = field(default_factory=dict)
    error: dict[str, float | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    pads: int = 0

    def achieved(self) -> dict[str, Any]:
        """Return the fraction of parameters removed, of the blocks and of the model.

        What stands in for removed parts counts as kept.
        """
        share = {k: 1 - after / max(1, before) for k, (before, after) in self.parameters.items()}
        return {
            "sparsity": share["blocks"],
            "sparsity_blocks": share["blocks"],
            "sparsity_model": share["model"],
            "bits": None,
            "parameters": {k: list(v) for k, v in self.parameters.items()},
        }

    def table(self) -> dict[str, Any]:
        """Return what was removed, the ranking and the error, for the report."""
        return {"removed": self.removed, "ranking": self.ranking, "error": self.error}


def check_reshape(model: nn.Module, blocks: Blocks, method: Any, device: torch.device) -> None:
    """Refuse, before any data is read, what a structural method can not do to a model.

    Parameters
    ----------
    method
        As for :func:`reshape`.

    Raises
    ------
    UserError
        For a number of parts that leaves none, and for models whose parts can not be missed.
    """
    check_separable(model, blocks)
    if method.unit == "width":
        find_units(blocks)
        return
    method.count(len(blocks))
    kind = method.sublayer_kind
    if kind == "block":
        return
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = (torch.arange(PROBE_TOKENS) % vocabulary)[None]
    work = RecoveryPass(model, blocks, [Chunk(ids, None, False)], device, kind, False)
    work.begin()
    update = method.update
    if update is not None and update.products and len(work.sublayers[0].members) > 1:
        raise UserError(
            "update",
            f"{work.sublayers[0].name} has no single module that a linear map could stand in for",
            "update=mean or update=none",
        )


def reshape(
    model: nn.Module,
    blocks: Blocks,
    chunks: list[Chunk],
    method: Any,
    device: torch.device,
    *,
    follow: bool = True,
    progress: bool = True,
) -> ReshapeResult:
    """Remove parts of a model in place.

    Parameters
    ----------
    model, blocks
        The model, in inference mode, and its decoder blocks.
    chunks
        The sequences; held-out ones serve to measure the error only.
    method
        A structural method: ``unit`` is ``depth`` or ``width``, ``update`` fits what stands in for
        removed parts (``products``, ``fit(moments)``) or is None.
    device
        Where the model takes its inputs.
    follow
        Whether what stands in for removed parts is fitted to what the shortened model produces,
        else to what the dense model does.

    Raises
    ------
    NumericalError
        For NaN or Inf in weights or activations; the part is named.
    UnsupportedModelError
        When the shortened model is not the chain of its blocks.
    CalibError
        When even one sequence at a time does not fit in memory.
    """
    for name, parameter in blocks.modules.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise NumericalError(f"{blocks.path}.{name}", "weights", "NaN or Inf")
    result = ReshapeResult(pads=sum(c.pads for c in chunks))
    counts = [parameters(blocks.modules)], [parameters(model)]
    result.parameters = {"blocks": counts[0], "model": counts[1]}
    try:
        if method.unit == "width":
            _narrow(model, blocks, chunks, method, device, progress, result)
        else:
            _shorten(model, blocks, chunks, method, device, follow, progress, result)
    except torch.OutOfMemoryError as error:
        raise CalibError(
            f"out of memory outside the forward passes ({error}). Use a device with more memory."
        ) from error
    for found, module in zip(counts, (blocks.modules, model), strict=True):
        if len(found) < 2:
            found.append(parameters(module))
    return result


def _shorten(
    model: nn.Module,
    blocks: Blocks,
    chunks: list[Chunk],
    method: Any,
    device: torch.device,
    follow: bool,
    progress: bool,
    result: ReshapeResult,
) -> None:
    count = method.count(len(blocks))
    if not count:
        return
    work = RecoveryPass(model, blocks, chunks, device, method.sublayer_kind, progress)
    work.begin()
    removed = work.timed("rank", lambda: _rank(work, method, count, result))
    if method.measure == "loss":
        work.through()
    dense = work.timed("error", lambda: _last_states(work))
    terms = []
    if method.update is not None:
        work.again()
        terms = work.timed("recovery", lambda: work.fit(removed, method.update, follow))
    expected = work.expected(removed, terms)
    result.removed = [work.name(i) for i in removed]
    work.remove(removed, terms)
    _finish(work, dense, result, expected)


def _rank(work: RecoveryPass, method: Any, count: int, result: ReshapeResult) -> list[int]:
    """Fill the ranking; return the numbers of the blocks that go."""
    depth = len(work.blocks)
    if getattr(method, "greedy", False):
        return _rank_greedily(work, count, result)
    if method.contiguous:
        values = work.spans(method.distance, count)
        removed: list[int] = method.choose(values, count)
        result.ranking = [
            {
                "name": work.name(i),
                "value": value,
                "removed": i in removed,
                "starts": i == removed[0],
            }
            for i, value in enumerate(values)
        ]
        rest = range(len(values), depth)
        result.ranking += [
            {"name": work.name(i), "value": None, "removed": i in removed, "starts": False}
            for i in rest
        ]
        return removed
    if method.measure == "loss":
        base, found = work.losses(range(depth), ())
        values = [value - base for value in found]
    else:
        values = work.distances(method.distance)
    removed = method.choose(values, count)
    result.ranking = [
        {"name": work.name(i), "value": value, "removed": i in removed}
        for i, value in enumerate(values)
    ]
    return removed


def _rank_greedily(work: RecoveryPass, count: int, result: ReshapeResult) -> list[int]:
    gone: list[int] = []
    values: dict[int, float] = {}
    for _ in range(count):
        left = [i for i in range(len(work.blocks)) if i not in gone]
        base, found = work.losses(left, gone)
        values |= {i: value - base for i, value in zip(left, found, strict=True)}
        gone.append(min(left, key=lambda i: (values[i], i)))
    result.ranking = [
        {
            "name": work.name(i),
            "value": values[i],
            "removed": i in gone,
            "round": gone.index(i) + 1 if i in gone else None,
        }
        for i in range(len(work.blocks))
    ]
    return sorted(gone)


def _narrow(
    model: nn.Module,
    blocks: Blocks,
    chunks: list[Chunk],
    method: Any,
    device: torch.device,
    progress: bool,
    result: ReshapeResult,
) -> None:
    if method.does_nothing:
        return
    groups = find_units(blocks)
    found, work = channel_variances(model, blocks, chunks, groups, device, progress)
    work.timed("propagate", lambda: work.propagate(len(blocks) - 1))
    dense = work.timed("error", lambda: _last_states(work))
    start = time.perf_counter()
    scores = [
        method.unit_scores(g.linear.weight, found[g.output.name].variance(), g.width, g.attention)
        for g in groups
    ]
    sizes = [group.size for group in groups]
    removed: list[Tensor] = method.choose(scores, sizes)
    saved = 0
    for group, values, gone in zip(groups, scores, removed, strict=True):
        saved += _silence(group, found[group.output.name].mean, gone, method)
        kind = "heads" if group.attention else "neurons"
        result.ranking.append(
            {
                "name": group.name,
                "kind": kind,
                "units": group.units,
                "parameters_each": group.size,
                "values": values.tolist(),
                "removed": gone.nonzero().flatten().tolist(),
            }
        )
        if bool(gone.any()):
            result.removed.append(f"{group.name}: {int(gone.sum())} of {group.units} {kind}")
        if not bool(group.silent()[gone].all()):
            raise NumericalError(group.name, "final count", "removed units are not zero")
    work.seconds["prune"] = time.perf_counter() - start
    for pair in result.parameters.values():
        pair.append(pair[0] - saved)
    _finish(work, dense, result, None)


def _silence(group: UnitGroup, mean: Tensor, gone: Tensor, method: Any) -> int:
    """Silence units, put their mean into the bias; return how many parameters are saved."""
    if not bool(gone.any()):
        return 0
    shift = method.compensation(group.linear.weight, mean, group.columns(gone))
    group.silence(gone)
    return int(gone.sum()) * group.size - add_bias(group.linear, shift)


def _finish(
    work: BlockPass, dense: tuple[Tensor | None, ...], result: ReshapeResult, expected: Any
) -> None:
    """Run the shortened model as it is now; check that it is what was meant; take its error."""
    after = RecoveryPass(work.model, work.blocks, work.chunks, work.recorder.device, "block", False)
    after.seconds, after.warnings = work.seconds, work.warnings
    after.again()
    if expected is not None:
        after.compare(expected)
    after.timed("error", after.through)
    short = _last_states(after)
    result.error = {
        kind: _relative(before, now)
        for kind, before, now in zip(("calibration", "heldout"), dense, short, strict=True)
    }
    result.seconds |= after.seconds
    result.warnings += after.warnings


def _last_states(work: BlockPass) -> tuple[Tensor | None, Tensor | None]:
    """Return samples of what the output head receives: of calibration and held-out tokens."""
    getter = getattr(work.model, "get_output_embeddings", None)
    head = getter() if getter else None
    if head is None:
        raise UnsupportedModelError("model", "has no output head", "causal language models")
    samples = []
    for heldout in (False, True):
        chunks = [c for c in work.chunks if c.heldout == heldout]
        sample = TokenSample(sum(c.tokens for c in chunks), ERROR_TOKENS)
        for chunk in chunks:
            sample.update(rows(chunk, work.recorder.after_blocks(chunk, head)))
        samples.append(sample.rows())
    return samples[0], samples[1]


def _relative(before: Tensor | None, after: Tensor | None) -> float | None:
    if before is None or after is None:
        return None
    size = before.double().square().sum()
    moved = (after.double() - before.double()).square().sum()
    if not bool(moved.isfinite()):
        raise NumericalError("output head", "final pass", "NaN or Inf in the hidden states")
    return float(moved / size) if size > 0 else None
