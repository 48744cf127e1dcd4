"""Fit what stands in for removed blocks or sub-layers, and take them out of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.capture import forward_hidden
from lm_calib_plugin.engine.depth import BLOCK, DepthPass
from lm_calib_plugin.engine.rows import row_weights, rows
from lm_calib_plugin.engine.structure import (
    LinearTerm,
    attach,
    delete_blocks,
    first_parameter,
    runs,
)
from lm_calib_plugin.engine.sublayers import first_input, without
from lm_calib_plugin.errors import NumericalError, UnsupportedModelError, named
from lm_calib_plugin.statistics.joint import JointMoments


class RecoveryPass(DepthPass):
    """A pass that ends with parts of the model replaced; see :class:`DepthPass`."""

    def fit(
        self, removed: Sequence[int], update: Any, follow: bool
    ) -> list[tuple[range, LinearTerm]]:
        """Fit a term to every run of removed blocks, or to every removed sub-layer.

        Parameters
        ----------
        update
            Has ``products`` and ``fit(moments)``.
        follow
            Whether later blocks see what the terms produce, else what the dense model does.
        """
        whole = self.kind == BLOCK
        terms = []
        ranges = runs(removed) if whole else [range(i, i + 1) for i in removed]
        starts = {r.start: r for r in ranges}
        index = 0
        while index < len(self.blocks):
            span = starts.get(index, range(index, index + 1))
            if index not in starts:
                self.propagate(index)
            elif whole:
                terms.append((span, self._fit_run(span, update, follow)))
            else:
                terms.append((span, self._fit_sublayer(index, update, follow)))
            index = span.stop
        return terms

    def _fit_run(self, span: range, update: Any, follow: bool) -> LinearTerm:
        def once() -> tuple[JointMoments, list[Tensor]]:
            moments, outputs = self._moments(update), []
            for chunk in self.chunks:
                assert chunk.hidden is not None
                hidden = chunk.hidden
                for index in span:
                    hidden = self.output(index, chunk, hidden)
                outputs.append(hidden)
                if not chunk.heldout:
                    x, y = rows(chunk, chunk.hidden).float(), rows(chunk, hidden).float()
                    moments.update(x, y - x, row_weights(chunk, x))
            return moments, outputs

        moments, outputs = self.until_it_fits(once)
        term = self._term(moments, update, span.start)
        for chunk, dense in zip(self.chunks, outputs, strict=True):
            assert chunk.hidden is not None
            chunk.hidden = chunk.hidden + term(chunk.hidden) if follow else dense
        return term

    def _fit_sublayer(self, index: int, update: Any, follow: bool) -> LinearTerm:
        sublayer = self.sublayers[index]
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def start() -> JointMoments:
            inputs.clear()
            outputs.clear()
            return self._moments(update)

        def look(moments: JointMoments, chunk: Chunk, _before: Tensor, _after: Tensor) -> None:
            x, y = rows(chunk, inputs.pop()), rows(chunk, outputs.pop())
            if not chunk.heldout:
                moments.update(x, y, row_weights(chunk, x))

        modules = sublayer.modules
        hooks = [
            modules[0].register_forward_pre_hook(
                lambda _m, args, kwargs: inputs.append(first_input(args, kwargs)), with_kwargs=True
            ),
            modules[-1].register_forward_hook(
                # Copied: some blocks add to what their parts return in place.
                lambda _m, _args, output: outputs.append(forward_hidden(output).clone())
            ),
        ]
        try:
            moments = self.each(index, start, look, keep=not follow)
        finally:
            for hook in hooks:
                hook.remove()
        term = self._term(moments, update, index)
        if follow:
            with without(sublayer, term):
                self.propagate(index)
        return term

    def _moments(self, update: Any) -> JointMoments:
        assert self.chunks[0].hidden is not None
        width, device = self.chunks[0].hidden.shape[-1], self.chunks[0].hidden.device
        return JointMoments(width, width, update.products, device)

    def _term(self, moments: JointMoments, update: Any, index: int) -> LinearTerm:
        if not moments.is_finite():
            raise NumericalError(
                self.name(index), "hidden states", "NaN or Inf", "try dtype=float32 or bfloat16"
            )
        with named(self.name(index)):
            found = update.fit(moments)
        like = first_parameter(self.blocks.modules[index])
        return LinearTerm(found.shift, found.down, found.up, like)

    def remove(self, removed: Sequence[int], terms: Sequence[tuple[range, LinearTerm]]) -> None:
        """Take the parts out of the model and put the terms in."""
        if self.kind != BLOCK:
            stand_ins = {span.start: term for span, term in terms}
            for index in removed:
                sublayer = self.sublayers[index]
                sublayer.replace(sublayer.stand_ins(stand_ins.get(index)))
            return
        modules, gone = list(self.blocks.modules), set(removed)
        delete_blocks(self.model, self.blocks, removed)
        for span, term in terms:
            earlier = [i for i in range(span.start) if i not in gone]
            if earlier:
                attach(modules[earlier[-1]], term)
            else:
                attach(modules[span.stop], term, before=True)

    def expected(self, removed: Sequence[int], terms: Sequence[tuple[range, LinearTerm]]) -> Tensor:
        """Return what the blocks of the shortened model have to give for the probe."""
        assert self.probe is not None
        chunk, gone = self.probe, set(removed)
        hidden = chunk.hidden
        assert hidden is not None
        by_place = {span.start: term for span, term in terms}
        for index in range(len(self.blocks)):
            term = by_place.get(index)
            if index not in gone:
                hidden = self.output(index, chunk, hidden)
            elif self.kind == BLOCK:
                hidden = hidden if term is None else hidden + term(hidden)
            else:
                with without(self.sublayers[index], term):
                    hidden = self.output(index, chunk, hidden)
        return hidden

    def compare(self, expected: Tensor) -> None:
        """Raise when the model, as it is now, gives something else for the probe.

        Raises
        ------
        UnsupportedModelError
            When blocks do something else in their new place.
        """
        assert self.probe is not None
        found = forward_hidden(self.recorder.templates[-1])
        close = torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-3)
        if not close and bool(expected.isfinite().all()):
            worst = float((found.float() - expected.float()).abs().max())
            raise UnsupportedModelError(
                "model",
                f"the blocks of {type(self.model).__name__} do something else when others are "
                f"missing (largest difference {worst:.3g}); the model in memory is changed",
                "models whose blocks depend on nothing but their arguments",
            )
