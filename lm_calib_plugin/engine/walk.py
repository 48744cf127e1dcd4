"""Block by block: observe the inputs, compress the layers, pass the data on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lm_calib_plugin.engine import notes
from lm_calib_plugin.engine.activations import install
from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.dealing import deal, whole
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.experts import fill_up
from lm_calib_plugin.engine.joining import add_up, join
from lm_calib_plugin.engine.layers import HEAD, TargetLayer, by_module
from lm_calib_plugin.engine.observe import InputGroups
from lm_calib_plugin.engine.passes import BlockPass
from lm_calib_plugin.engine.plan import Plan, WalkResult
from lm_calib_plugin.engine.ranks import Ranks
from lm_calib_plugin.engine.residence import around, resident
from lm_calib_plugin.engine.rows import rows
from lm_calib_plugin.engine.run_statistics import run_statistics
from lm_calib_plugin.engine.smoothing import ScaledInput, scale_inputs, scaled_elsewhere
from lm_calib_plugin.engine.solve import Solver
from lm_calib_plugin.engine.static_ranges import count, input_ranges, limits_of
from lm_calib_plugin.engine.watched import Watched, listen, nothing, pair
from lm_calib_plugin.engine.wiring import Wiring, wiring_of
from lm_calib_plugin.errors import CalibError, NumericalError
from lm_calib_plugin.statistics import LayerStats, Ranges, remembered_factors


def run(
    model: nn.Module,
    blocks: Blocks,
    chunks: list[Chunk],
    plan: Plan,
    device: torch.device,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> WalkResult:
    """Compress the layers of a plan in place.

    Parameters
    ----------
    model, blocks
        The model, in inference mode, and its decoder blocks.
    chunks
        Calibration chunks; empty when no data is used.
    device
        Where the model takes its inputs.
    ranks
        The processes that divide the work; where it can not be divided, each does all of it.

    Raises
    ------
    NumericalError
        For NaN or Inf in weights, activations or results; the layer is named. Blocks done before
        stay compressed in memory: load the model again.
    CalibError
        When even one sequence at a time does not fit in memory.
    """
    for layers in by_module(plan.layers):
        with resident(layers[0].module, changes=False):
            for layer in layers:
                if not bool(layer.stored.isfinite().all()):
                    raise NumericalError(layer.name, "weights", "NaN or Inf before compression")
    try:
        walk = _Walk(model, blocks, chunks, plan, device, progress, ranks or Ranks())
        with remembered_factors(None if walk.shared is None else walk.shared.factors):
            return walk.run()
    except torch.OutOfMemoryError as error:
        raise CalibError(
            f"out of memory outside the forward passes ({error}): the statistics or the solve of "
            "one layer do not fit. Use a device with more memory, or leave the widest layers out "
            "(ignore=...)."
        ) from error


class _Walk(BlockPass):
    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        chunks: list[Chunk],
        plan: Plan,
        device: torch.device,
        progress: bool,
        ranks: Ranks,
    ) -> None:
        self.shared = run_statistics(model, plan) if chunks else None
        undivided = plan.undivided(bool(chunks), self.shared is not None) if ranks.several else ""
        self.ranks = Ranks() if undivided else ranks
        self.dealt = whole(chunks)
        if self.ranks.several:
            second_order = "gram" in plan.statistic
            self.dealt = deal(chunks, ranks.rank, ranks.count, second_order)
        super().__init__(model, blocks, self.dealt.chunks, device, chunks[0] if chunks else None)
        self.plan, self.progress = plan, progress
        self.wiring: Wiring | None = None
        # Chunks there are, even if not here; whether first tokens do not count.
        self.has_data = bool(chunks)
        self.skipped = any(chunk.skip_first for chunk in chunks)
        # Parameters of the block in work with what they were, where its layers come in steps.
        self.dense_values: list[tuple[nn.Parameter, Tensor]] = []
        self.result = WalkResult(
            seconds=self.seconds, warnings=self.warnings, pads=sum(c.pads for c in chunks)
        )
        if undivided:
            self.warnings.append(f"every process did the whole work: {undivided}")
        elif self.ranks.several:
            self.result.processes = list(self.dealt.tokens)
        self.solver = Solver(
            plan, blocks, self.chunks, self.result, progress, self.ranks, self.timed
        )

    def run(self) -> WalkResult:
        by_block: dict[int, list[TargetLayer]] = {}
        for layer in self.plan.layers:
            by_block.setdefault(layer.block, []).append(layer)
        if self.has_data and not self.recalls:
            self.timed("capture", self.capture)
            self.result.waited_on_host = self.hidden.on_host
        for chunk in self.chunks if self.corrects else ():
            assert chunk.hidden is not None
            chunk.dense = None if chunk.heldout else self.hidden.twin(chunk.hidden)
        bar = tqdm(
            range(len(self.blocks)),
            desc=f"{self.plan.method.label} blocks",
            disable=not self.progress,
        )
        # After the last block that holds a target, data only matters for the head.
        last = len(self.blocks) if HEAD in by_block else max(by_block, default=-1)
        for index in bar:
            layers = by_block.get(index, [])
            if layers or (self.has_data and index < last):
                with self.at_hand(index, changes=bool(layers)):
                    if self.has_data:
                        self._block(index, layers, more=index < last)
                    else:
                        self._without_data(layers)
        if HEAD in by_block:
            head = by_block[HEAD][0]
            with resident(head.module), around(self.model, self.blocks.modules):
                self._head(head)
        order = {layer.name: number for number, layer in enumerate(self.plan.layers)}
        self.result.rows.sort(key=lambda row: order[row.name])
        self.warnings += notes.of_experts(self.solver.unseen, self.solver.borrowed)
        self.warnings += notes.of_rows(self.result.rows)
        if self.shared is not None:
            self.warnings += self.shared.finish(self.halved)
        if self.ranks.several:
            said = self.ranks.exchange("warnings", self.warnings)
            self.warnings[:] = notes.of_all(said)
        return self.result

    def _without_data(self, layers: Sequence[TargetLayer]) -> None:
        self.solver.solve(layers, {})
        if self.plan.method.activations is not None:
            self._install(layers, None)

    @property
    def corrects(self) -> bool:
        """Whether layers make up for the error of earlier blocks."""
        plan = self.plan
        return plan.method.correction > 0 and plan.propagate == "compressed" and self.has_data

    @property
    def recalls(self) -> bool:
        """Whether an earlier run watched what this one needs, so that nothing has to be run."""
        return self.shared is not None and self.shared.known

    # --- stages --------------------------------------------------------------------------

    def _block(self, index: int, layers: Sequence[TargetLayer], more: bool) -> None:
        more = more and not self.recalls
        ahead = self.plan.propagate == "dense" and more and bool(layers)
        if layers:
            self._work_on(index, layers, ahead)
        if ahead:
            for chunk in self.chunks:
                chunk.hidden, chunk.dense = chunk.dense, None
        elif more:
            self.timed("propagate", lambda: self.propagate(index, dense=not layers))

    def _look_ahead(self, index: int, groups: InputGroups) -> dict[int, Watched]:
        """Watch a block that is still dense; its outputs wait in ``chunk.dense``.

        ``chunk.hidden`` stays the input of the block, for whoever runs it again.
        """
        for chunk in self.chunks:
            chunk.dense = chunk.hidden
        watched = self._watched(index, groups, keep=True)
        for chunk in self.chunks:
            chunk.hidden, chunk.dense = chunk.dense, chunk.hidden
        return watched

    def _work_on(self, index: int, layers: Sequence[TargetLayer], ahead: bool) -> None:
        """Treat the layers of one block: observe, transform, compress, and round their inputs."""
        if self.recalls:
            seen = self.timed("observe", lambda: self._recalled(index, layers))
            self.solver.solve(layers, seen)
        else:
            self._observe_and_solve(index, layers, ahead)
        if self.plan.method.activations is not None:
            self.timed("activations", lambda: self._round_inputs(index, layers))

    def _observe_and_solve(self, index: int, layers: Sequence[TargetLayer], ahead: bool) -> None:
        """Watch the layers of one block, and give them new weights; in steps where asked."""
        method, groups = self.plan.method, self.groups(index, layers)
        scales = method.transform is not None and method.transform.level == "inputs"
        steps = groups.steps() if self.plan.true_sequential else [layers]
        watched: dict[int, Watched] = {}
        if ahead:
            watched = self._look_ahead(index, groups)
        elif len(steps) == 1 or scales:
            last = len(steps) == 1
            watched = self._watched(index, groups, follow=last, everywhere=scales)
        if scales:
            self.timed("transform", lambda: self._scale(index, layers, watched))
        if len(steps) > 1 and self.corrects:
            self.dense_values = [
                (p, p.data.clone()) for p in self.blocks.modules[index].parameters()
            ]
        for step in steps:
            if len(steps) > 1:
                own, last = self.groups(index, step), step is steps[-1]
                watched = self._watched(index, own, follow=last)
            self.solver.solve(step, watched)
        self.dense_values = []

    def _scale(
        self, index: int, layers: Sequence[TargetLayer], watched: Mapping[int, Watched]
    ) -> None:
        """Scale inputs and weights of a block against each other; statistics follow."""
        if self.wiring is None:
            self.wiring = wiring_of(self.model, self.blocks)
            self.warnings += notes.of_unscaled(self.wiring, self.plan.layers)
        spec = self.plan.method.activations

        def stats_of(layer: TargetLayer) -> LayerStats:
            stats = watched[id(layer)].stats
            assert stats is not None
            return stats

        def rounded(layer: TargetLayer, weight: Tensor) -> Tensor:
            method: Any = self.plan.method_of(layer)
            return method.rounded_to_nearest(weight, layer.parameter.dtype)

        found: list[ScaledInput] | None = None
        if self.ranks.rank == 0:
            found = scale_inputs(
                self.blocks,
                index,
                self.wiring,
                layers,
                self.chunks[0],
                stats_of,
                self.plan.method.transform,
                rounded,
                None if spec is None else spec.round,
            )
        for done in scaled_elsewhere(found, self.ranks, self.blocks.modules[index], layers):
            for seen in {id(watched[id(x)]): watched[id(x)] for x in done.layers}.values():
                seen.divide(done.factors)
            self.result.transforms.append(notes.scaling_facts(done))

    def _round_inputs(self, index: int, layers: Sequence[TargetLayer]) -> None:
        """Let the layers round what comes in from now on; later blocks see the difference."""
        method, limits = self.plan.method, None
        if not method.activations.dynamic:
            limits = self._limits(input_ranges(self, index, layers))
        self._install(layers, limits)

    def _limits(self, ranges: dict[str, Ranges]) -> dict[str, tuple[float, float | None]]:
        method = self.plan.method
        if self.ranks.several:
            distinct = list({id(one): one for one in ranges.values()}.values())
            add_up(distinct, [None] * len(distinct), self.ranks, "ranges")
        return limits_of(ranges, method.activations, method.observer, self.skipped)

    def _install(
        self, layers: Sequence[TargetLayer], limits: dict[str, tuple[float, float | None]] | None
    ) -> None:
        spec = self.plan.method.activations
        install(layers, spec, None if limits is None else {n: x for n, (x, _) in limits.items()})
        for row in self.result.rows if limits is not None else ():
            if row.name in limits:
                row.input_limit, row.input_limit_rest = limits[row.name]

    @contextlib.contextmanager
    def as_dense(self) -> Iterator[None]:
        """Put the weights back that the block had before its first step, for a while."""
        now = [p.data for p, _ in self.dense_values]
        try:
            for parameter, value in self.dense_values:
                parameter.data = value
            yield
        finally:
            for (parameter, _), value in zip(self.dense_values, now, strict=True):
                parameter.data = value

    def _watched(
        self,
        index: int,
        groups: InputGroups,
        keep: bool = False,
        follow: bool = True,
        everywhere: bool = False,
    ) -> dict[int, Watched]:
        """Collect statistics of every distinct input; by ``id(layer)`` of the layers.

        With ``everywhere``, those of all processes are needed by each, not by one.
        """

        def start() -> list[Watched]:
            return [self._empty(group[0]) for group in groups.groups]

        both = pair if self.corrects else None
        watched = self.timed(
            "observe", lambda: self.observe(index, groups, start, listen, keep, both, follow)
        )
        borrowed = self._joined(groups.groups, watched, everywhere)
        if self.shared is not None:
            self.shared.add(index, groups.groups, watched, borrowed)
        return {
            id(layer): seen
            for group, seen in zip(groups.groups, watched, strict=True)
            for layer in group
        }

    def _joined(
        self,
        groups: Sequence[Sequence[TargetLayer]],
        watched: Sequence[Watched],
        everywhere: bool = False,
    ) -> Mapping[str, int]:
        """Bring together what all processes watched, and fill up what experts lack."""
        owners = self.ranks.owners([self.solver.cost(group) for group in groups])
        for seen, owner in zip(watched, owners, strict=True):
            seen.owner = owner
        if self.ranks.several:
            places = [(g[0].shape[1], g[0].parameter.device) for g in groups]
            self.timed("exchange", lambda: join(watched, places, self.ranks, everywhere))
        # Where all have everything, nobody is asked any more.
        ranks = Ranks(self.ranks.rank) if everywhere else self.ranks
        complete = [everywhere or seen.owner == ranks.rank for seen in watched]
        for group, seen, here in zip(groups, watched, complete, strict=True):
            seen.check(group[0].name, here)
        pairs = [
            ((g[0], w.stats), here)
            for g, w, here in zip(groups, watched, complete, strict=True)
            if w.stats is not None
        ]
        known, here = [pair for pair, _ in pairs], [own for _, own in pairs]
        borrowed = self.timed("observe", lambda: fill_up(known, ranks, here))
        self.solver.borrowed |= borrowed
        # Runs that share statistics are not divided between processes: these are complete.
        for part in {part for seen in watched for part in seen.others if not part[1]}:
            fill_up([(g[0], w.others[part]) for g, w in zip(groups, watched, strict=True)])
        for seen, here in zip(watched, complete, strict=True):
            if not here:
                seen.forget()
        return borrowed

    def _recalled(self, index: int, layers: Sequence[TargetLayer]) -> dict[int, Watched]:
        """Return what an earlier run watched of the same inputs; by ``id(layer)``."""
        assert self.shared is not None
        found, borrowed = self.shared.of_block(index, layers)
        self.solver.borrowed |= borrowed
        return found

    def _empty(self, layer: TargetLayer) -> Watched:
        # The two models send tokens to experts of their own.
        corrected = self.corrects and layer.expert is None and layer.block != HEAD
        wanted = () if self.shared is None else self.shared.others
        return nothing(layer, self.plan, self.dealt, corrected, wanted)

    def _halve(self, reason: str) -> None:
        """Before chunks are made smaller, which a run alone might not have to do, watch less."""
        if self.shared is not None and self.shared.give_up_others():
            self.recorder.forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return
        super()._halve(reason)

    def _head(self, layer: TargetLayer) -> None:
        watched: dict[int, Watched] = {}
        spec, limits = self.plan.method.activations, None
        static = spec is not None and not spec.dynamic
        ranges = Ranges.empty(layer.shape[1], layer.device)
        if self.recalls:
            watched = self._recalled(HEAD, [layer])
        elif self.has_data:
            seen = self._empty(layer)
            self.timed("observe", lambda: self._observe_head(layer, seen, ranges, static))
            self._joined([[layer]], [seen])
            watched = {id(layer): seen}
            if self.shared is not None:
                self.shared.add(HEAD, [[layer]], [seen], {})
        self.solver.solve([layer], watched)
        if static:
            limits = self._limits({layer.name: ranges})
        if spec is not None:
            self._install([layer], limits)

    def _observe_head(
        self, layer: TargetLayer, seen: Watched, ranges: Ranges, static: bool
    ) -> None:
        """Watch what the output head receives; with ``static``, also its ranges."""
        for chunk in self.chunks:
            received = rows(chunk, self.recorder.after_blocks(chunk, layer.module))
            listen([seen], chunk, 0, received, chunk.owners())
            if static:
                count([ranges], chunk, 0, received, chunk.owners())
