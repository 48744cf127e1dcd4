"""Mixtures without a search in a bank: ``tasa`` aligns gradient traces, ``cross`` weighs halves."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import torch

from lm_calib_plugin.bank.mixing import FLOOR
from lm_calib_plugin.bank.mixtures import Found, Mixture, Task, with_record
from lm_calib_plugin.bank.traces import align_shares, gradient_traces
from lm_calib_plugin.calibration import CalibrationSet, Option
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.expression import SourceTerm
from lm_calib_plugin.recipe import Recipe


class Tasa(Mixture):
    """``tasa(TARGET+A+B)``: shares of A and B whose gradient traces look like the target's.

    After TASA (arXiv 2607.00908), in our own reading; see :mod:`lm_calib_plugin.bank.traces`. The
    target's text is looked at and not used: what is searched is a substitute for it.
    """

    name = "tasa"
    fewest = 3
    options = {"sequences": Option("whole", default=8, lowest=1)}

    def resolve(self, task: Task) -> Found:
        """Measure traces of some sequences of every source, align, and draw the mix."""
        task.require_layers(self.name)
        target, *sources = (replace(term, weight=1.0) for term in self.term.inner)
        count = min(self.settings["sequences"], task.recipe.nsamples)

        def traces(term: SourceTerm) -> torch.Tensor:
            drawn = task.draw((term,), count, task.recipe.fold)
            return gradient_traces(
                task.model, task.layers, drawn.sequences, progress=task.runtime.progress
            )

        wanted = traces(target)
        measured = torch.stack([traces(term) for term in sources])
        found = align_shares(measured, wanted, floor=FLOOR)
        terms = [replace(t, weight=float(w)) for t, w in zip(sources, found, strict=True)]
        drawn = task.draw(terms, task.recipe.nsamples, task.recipe.fold)
        record = {
            "expression": self.term.text(),
            "sequences": count,
            "shares": {t.text(): round(t.weight, 6) for t in terms},
        }
        return Found(dataclasses.replace(drawn, sources=tuple(with_record(drawn.sources, record))))


class Cross(Mixture):
    """``cross(DOMAIN+GENERAL)?lambda=0.5``: statistics of a domain and of general text, weighed.

    Cross-calibration (Williams et al., arXiv 2502.18424): the Hessian of in-domain and that of
    general text are combined. Here each gives half of the sequences; the tokens of the first count
    ``lambda`` of all, those of the second ``1 - lambda``, also where one has shorter sequences.
    """

    name = "cross"
    most = 2
    options = {"lambda": Option("number", default=0.5, above=0, below=1)}

    def check(self, recipe: Recipe) -> None:
        """Refuse a number of sequences that can not be halved."""
        super().check(recipe)
        if recipe.nsamples < 2:
            raise UserError(
                "nsamples",
                f"got {recipe.nsamples} with `cross`",
                "2 or more, half of them from each source",
                "for instance nsamples=128",
            )

    def resolve(self, task: Task) -> Found:
        """Draw both halves; the weights are in the set."""
        halves = [replace(term, weight=0.5) for term in self.term.inner]
        drawn = task.draw(halves, task.recipe.nsamples, task.recipe.fold)
        asked = self.settings["lambda"]
        weights = list(drawn.weights or [1.0] * drawn.nsamples)
        for source, share in zip(drawn.sources, (asked, 1 - asked), strict=True):
            rows = source["rows"]
            # Sequences of one source keep their weights relative to each other.
            counted = sum(weights[row] * len(drawn.sequences[row]) for row in rows)
            scale = share * drawn.tokens / counted
            for row in rows:
                weights[row] *= scale
        record = {"expression": self.term.text(), "lambda": asked}
        return Found(
            CalibrationSet.of(
                drawn.sequences,
                seqlen=drawn.seqlen,
                seed=drawn.seed,
                tokenizer=drawn.tokenizer,
                sources=with_record(drawn.sources, record),
                weights=weights,
            )
        )
