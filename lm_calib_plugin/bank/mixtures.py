"""Mixtures: calibration expressions whose shares or weights are found, not typed.

``minimax(A+B+C)``, ``weighted(A*0.7+B*0.3)`` and ``no_worse(A+B)`` search shares on held-out errors
in a statistics bank; ``tasa(TARGET+A+B)`` aligns gradient traces with those of a target;
``cross(DOMAIN+GENERAL)`` weighs two sets. Each ends in an ordinary calibration set.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from lm_calib_plugin import engine, registry, storage
from lm_calib_plugin.bank.build import Part, build_bank
from lm_calib_plugin.bank.mixing import FLOOR, Mix, Objective, search_mix
from lm_calib_plugin.bank.traces import align_shares, gradient_traces
from lm_calib_plugin.calibration import CalibrationSet, build_calibration
from lm_calib_plugin.calibration.build import interleaved
from lm_calib_plugin.calibration.options import Option, read_options
from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.expression import SourceTerm, shares
from lm_calib_plugin.method import Method
from lm_calib_plugin.recipe import STORED_SET, Recipe
from lm_calib_plugin.runtime import Runtime

REVISION = 1  # raised when the same expression begins to give other shares
FEWEST_CHECKED = 8


@dataclass(frozen=True)
class Task:
    """What a mixture is resolved for.

    Parameters
    ----------
    recipe
        Its calibration is the mixture; the method and the counts are used.
    model, tokenizer, blocks, layers
        The dense model and the layers that will be compressed.
    method
        The method, with its options.
    seqlen, model_id, vocab_size
        As for :func:`~lm_calib_plugin.calibration.build_calibration`.
    runtime
        Progress bars and chunk size.
    """

    recipe: Recipe
    model: nn.Module
    tokenizer: Any
    blocks: engine.Blocks
    layers: Sequence[engine.TargetLayer]
    method: Method
    seqlen: int
    model_id: str
    vocab_size: int
    runtime: Runtime

    def draw(self, terms: Sequence[SourceTerm], count: int, fold: str) -> CalibrationSet:
        """Draw plain terms."""
        recipe = self.recipe.replaced(calibration=tuple(terms), nsamples=count, fold=fold)
        return build_calibration(
            recipe,
            self.tokenizer,
            self.model,
            seqlen=self.seqlen,
            model_id=self.model_id,
            vocab_size=self.vocab_size,
            runtime=self.runtime,
        )


@dataclass(frozen=True)
class Found:
    """What a mixture came to: the set, and the ridge that was found best (or None)."""

    calibration: CalibrationSet
    damp: float | None = None


class Mixture(ABC):
    """Base of every mixture; ``fewest`` and ``most`` are how many sources it takes."""

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Option]] = {}
    fewest: ClassVar[int] = 2
    most: ClassVar[float] = math.inf

    def __init__(self, term: SourceTerm) -> None:
        self.term = term
        self.settings = read_options(self.name, self.options, term.options)
        count = len(term.inner)
        if not self.fewest <= count <= self.most or term.argument:
            raise UserError(
                "calibration",
                f"`{term.text()}` has {count} sources",
                f"`{self.name}` takes "
                + (f"{self.fewest}" if self.most == self.fewest else f"{self.fewest} or more"),
                f"for instance {self.name}(c4+self)",
            )
        texts = [inner.text() for inner in term.inner]
        if len(set(texts)) < count:
            raise UserError("calibration", f"`{term.text()}` names a source twice", "name it once")

    @abstractmethod
    def resolve(self, task: Task) -> Found:
        """Return the calibration set."""
        ...


class Searched(Mixture):
    """A mixture whose shares are found in a statistics bank."""

    def __init__(self, term: SourceTerm) -> None:
        super().__init__(term)
        stored = [inner.text() for inner in term.inner if inner.name == STORED_SET]
        if stored:
            raise UserError(
                "calibration",
                f"`{self.name}` of {listed(stored)}",
                "sources of documents: a finished set has no documents left to judge it by",
                "name the source that the set was made of",
            )

    def objective(self) -> Objective:
        """Return what the shares are to be good at."""
        raise NotImplementedError

    def resolve(self, task: Task) -> Found:
        """Draw every source in two folds, fill a bank, search, and keep a share of each."""
        if task.method.statistic == "none":
            raise UserError(
                "calibration",
                f"`{self.term.text()}` with method {task.recipe.method}, which uses no data",
                "a method whose result depends on the calibration data, such as wanda",
            )
        parts = self._parts(task)
        chosen = [p.calibration for p in parts if p.fold == "choose"]
        identity = {
            "revision": REVISION,
            "model": task.model_id,
            "layers": [layer.name for layer in task.layers],
            "method": task.recipe.method,
            "options": task.method.options(),
            "method_revision": task.method.revision,
            "exclude_first_token": task.recipe.exclude_first_token,
            "objective": repr(self.objective()),
            "search_damp": self._searches_damp(task),
            "parts": [[p.source, p.fold, p.calibration.calib_id] for p in parts],
        }
        place = storage.cache_dir() / "mixes" / storage.digest(identity)
        with storage.only_once(place):
            mix = self._recalled(place) or self._search(task, parts, place)
        counts = shares(
            [replace(t, weight=mix["shares"][t.text()]) for t in self.term.inner],
            task.recipe.nsamples,
        )
        record = {"expression": self.term.text(), "fold": "choose", "method": task.recipe.method}
        return Found(joined(chosen, counts, task, record | mix), mix["damp"])

    def _searches_damp(self, task: Task) -> bool:
        asked = task.recipe.damp is None
        return asked and "damp" in task.method.options() and task.method.statistic == "gram"

    def _parts(self, task: Task) -> list[Part]:
        count = task.recipe.nsamples
        checked = max(FEWEST_CHECKED, math.ceil(count / 2))
        parts = []
        for term in self.term.inner:
            alone = (replace(term, weight=1.0),)
            name = term.text()
            drawn = task.draw(alone, count, "choose")
            second = task.method.statistic == "gram"
            parts.append(Part(name, "choose", drawn, second_order=second))
            parts.append(Part(name, "validate", task.draw(alone, checked, "validate")))
        return parts

    def _search(self, task: Task, parts: list[Part], place: Any) -> dict[str, Any]:
        """Search once; the bank is given back, what was found is kept."""
        bank = build_bank(
            task.model,
            task.layers,
            task.blocks,
            parts,
            place.with_name(place.name + ".bank"),
            exclude_first_token=task.recipe.exclude_first_token,
            runtime=task.runtime,
        )
        found: Mix = search_mix(
            bank,
            task.layers,
            task.method,
            [term.text() for term in self.term.inner],
            self.objective(),
            search_damp=self._searches_damp(task),
            progress=task.runtime.progress,
        )
        plain = found.to_json()
        content = json.dumps({"digest": storage.digest(plain), "mix": plain})
        storage.write_text(place.with_suffix(".json"), content)
        shutil.rmtree(bank.folder, ignore_errors=True)
        return json.loads(json.dumps(plain))  # as it is read back

    @staticmethod
    def _recalled(place: Any) -> dict[str, Any] | None:
        """Return what an equal search found before; a damaged file counts as none."""
        try:
            content = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
            mix: dict[str, Any] = content["mix"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return mix if storage.digest(mix) == content.get("digest") else None


class Minimax(Searched):
    """``minimax(A+B)``: the worst domain is as good as can be."""

    name = "minimax"

    def objective(self) -> Objective:
        """Return the largest log regret."""
        return Objective("minimax")


class Weighted(Searched):
    """``weighted(A*0.7+B*0.3)``: the mean over domains, by the shares that are typed."""

    name = "weighted"

    def objective(self) -> Objective:
        """Return the mean log regret by traffic."""
        return Objective("weighted", {t.text(): t.weight for t in self.term.inner})


class NoWorse(Searched):
    """``no_worse(A+B)?limit=1.1``: the mean, with no domain above ``limit`` times its own error."""

    name = "no_worse"
    options = {"limit": Option("number", default=1.1, lowest=1)}

    def objective(self) -> Objective:
        """Return the mean log regret with a limit."""
        return Objective("no_worse", limit=self.settings["limit"])


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
    general text are combined. Here each gives half of the sequences, and the sequences of the
    first count ``lambda`` in all, those of the second ``1 - lambda``.
    """

    name = "cross"
    most = 2
    options = {"lambda": Option("number", default=0.5, above=0, below=1)}

    def resolve(self, task: Task) -> Found:
        """Draw both halves; the weights are in the set."""
        halves = [replace(term, weight=0.5) for term in self.term.inner]
        drawn = task.draw(halves, task.recipe.nsamples, task.recipe.fold)
        asked = self.settings["lambda"]
        weights = [1.0] * drawn.nsamples
        for source, share in zip(drawn.sources, (asked, 1 - asked), strict=True):
            rows = source["rows"]
            for row in rows:
                weights[row] = share * drawn.nsamples / len(rows)
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


def make_task(
    recipe: Recipe, model: nn.Module, tokenizer: Any, *, seqlen: int, runtime: Runtime
) -> Task:
    """Return the task of a recipe on a model: blocks, layers and digests looked up.

    Raises
    ------
    UserError
        When the recipe does not fit the model.
    """
    blocks = engine.find_blocks(model, recipe.blocks)
    layers, _ = engine.select_layers(model, blocks, recipe.targets, recipe.ignore, recipe.untie)
    method = recipe.entry.load().from_options(recipe.method_options())
    for layer in layers:
        method.check_layer(layer.name, layer.shape)
    return Task(
        recipe,
        model,
        tokenizer,
        blocks,
        # What lies behind the blocks has no place in a bank.
        [layer for layer in layers if layer.block != engine.HEAD],
        method,
        seqlen,
        engine.model_digest(model),
        int(model.get_input_embeddings().weight.shape[0]),  # type: ignore[operator]
        runtime,
    )


def draw(task: Task) -> Found:
    """Return the calibration set of a task's recipe, whether it is a mixture or not."""
    mixture = mixture_of(task.recipe)
    if mixture is not None:
        return make_mixture(mixture).resolve(task)
    return Found(
        build_calibration(
            task.recipe,
            task.tokenizer,
            task.model,
            seqlen=task.seqlen,
            model_id=task.model_id,
            vocab_size=task.vocab_size,
            runtime=task.runtime,
        )
    )


def make_mixture(term: SourceTerm) -> Mixture:
    """Return the mixture of a term, its options checked."""
    made: Mixture = registry.find("mixture", term.name, "calibration").load()(term)
    return made


def mixture_of(recipe: Recipe) -> SourceTerm | None:
    """Return the mixture that a recipe is calibrated with, or None."""
    terms = recipe.terms
    return terms[0] if len(terms) == 1 and terms[0].name in registry.table("mixture") else None


def joined(
    parts: Sequence[CalibrationSet],
    counts: Sequence[int],
    task: Task,
    record: dict[str, Any],
) -> CalibrationSet:
    """Return the first ``counts[i]`` sequences of every part, interleaved evenly."""
    order = interleaved(counts)
    sources = []
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        (own,) = part.sources
        rows = [row for row, (owner, _) in enumerate(order) if owner == number]
        sources.append(
            own
            | {
                "nsequences": count,
                "weight": count / sum(counts),
                "share": count / sum(counts),
                "indices": list(own.get("indices", ()))[:count],
                "rows": rows,
            }
        )
    return CalibrationSet.of(
        [parts[owner].sequences[place] for owner, place in order],
        seqlen=max(part.seqlen for part in parts),
        seed=task.recipe.calib_seed,
        tokenizer=parts[0].tokenizer,
        sources=with_record(sources, record),
    )


def with_record(sources: Sequence[dict[str, Any]], record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return source records with what the mixture found beside the first."""
    return [s | ({"mixture": record} if i == 0 else {}) for i, s in enumerate(sources)]
